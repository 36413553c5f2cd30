"""When to ask again: which errors pass, how long to wait between attempts, and when to give up.

It knows the error tree and the deadline, and of HTTP only how a broken connection looks. What is asked must be
idempotent.
"""

import logging
import math
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception

from logitcache.client.connecting import AnswerLate
from logitcache.client.deadline import Deadline
from logitcache.client.transport import ConnectionBroke
from logitcache.labels.errors import DeadlineExceeded, LogitcacheError

FIRST_WAIT_S = 0.1
"""Upper bound of the first wait; it doubles with each attempt. The wait is drawn evenly from 0 to the bound, so that
many training loops do not come back to a restarted server in the same instant."""

LONGEST_WAIT_S = 2.0
"""Upper bound of any wait that the server did not ask for."""

TELL_EVERY_S = 10.0
"""Seconds between two warnings of one call; its retries between are logged at debug level."""

_LOG = logging.getLogger("logitcache.client")
_DRAWS = random.Random()  # noqa: S311 - waits are no secrets
"""Of its own: the process's generator may be replaying an augmentation in another thread."""
Answer = TypeVar("Answer")


def ask(
    attempt: Callable[[], Answer],
    *,
    url: str,
    deadline: Deadline,
    retries: int | None,
    on_retry: Callable[[], None],
) -> Answer:
    """What ``attempt`` returns, tried again while its error says ``retry``, at most ``retries`` times (None: no bound).

    A connection that broke is tried again at once the first time: most likely the server had closed it while it was
    idle.

    The machinery of retries is set up after the first attempt failed: it takes longer than a batch does.

    Raises:
        DeadlineExceeded: the time is over, or would be before the next attempt; chained to the last error.
        LogitcacheError: the last error, when it will not pass by itself or the retries are used up.
    """

    try:
        return attempt()
    except LogitcacheError as error:
        if not error.retry:
            raise
        first: LogitcacheError | None = error

    def attempt_again() -> Answer:
        nonlocal first
        if first is not None:
            error, first = first, None
            raise error
        return attempt()

    before: LogitcacheError | None = None

    def give_up(state: RetryCallState) -> Answer:
        error = _error(state)
        if before is not None and (isinstance(error, DeadlineExceeded) or isinstance(error.__cause__, AnswerLate)):
            error = before  # the last attempt had no time: what was wrong is what those before met
        if retries is not None and state.attempt_number > retries and deadline.remaining_s:
            raise error
        raise DeadlineExceeded(
            f"{url} gave no answer within {deadline.timeout_s:g} s (attempts: {state.attempt_number}); "
            f"the last error was: {error.message}"
        ) from error

    told_s = -math.inf

    def note(state: RetryCallState) -> None:
        nonlocal told_s, before
        before = _error(state)
        on_retry()
        now_s = time.monotonic()
        loud = state.upcoming_sleep and now_s - told_s >= TELL_EVERY_S
        told_s = now_s if loud else told_s
        level = logging.WARNING if loud else logging.DEBUG
        _LOG.log(level, "%s; asking again in %.1f s", _error(state).message, state.upcoming_sleep)

    def is_over(state: RetryCallState) -> bool:
        used_up = retries is not None and state.attempt_number > retries
        return used_up or state.upcoming_sleep >= deadline.remaining_s

    policy = Retrying(
        retry=retry_if_exception(lambda error: isinstance(error, LogitcacheError) and error.retry),
        wait=_wait_s,
        stop=is_over,
        before_sleep=note,
        retry_error_callback=give_up,
    )
    return policy(attempt_again)


def _wait_s(state: RetryCallState) -> float:
    error = _error(state)
    if error.retry_after_s is not None:
        return error.retry_after_s + _DRAWS.uniform(0.0, FIRST_WAIT_S)
    if state.attempt_number == 1 and isinstance(error.__cause__, ConnectionBroke):
        return 0.0
    # Full jitter, as `tenacity.wait_random_exponential` has it.
    return _DRAWS.uniform(0.0, min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(state.attempt_number - 1, 32)))


def _error(state: RetryCallState) -> LogitcacheError:
    error = state.outcome.exception() if state.outcome else None
    if not isinstance(error, LogitcacheError):
        raise TypeError(f"only errors of logitcache are tried again, not {error!r}")
    return error


def seconds_to_wait(text: str | None) -> float | None:
    """Seconds that a ``Retry-After`` header asks for, be it a number or a date (RFC 9110, 10.2.3); None if it makes no
    sense.
    """
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
