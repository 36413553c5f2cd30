"""Waiting for labels that a job or another run is still to bring. It knows nothing of where they come from."""

import time
from collections.abc import Callable
from typing import TypeVar

from logitcache.client.deadline import Deadline
from logitcache.labels.errors import DeadlineExceeded, RowsMissing

FIRST_PAUSE_S, MOST_PAUSE_S = 0.25, 2.0
"""Seconds between two looks: shards are committed every few seconds at best, and a reader looks twice a second."""

Soft = TypeVar("Soft")


def once_labelled(fetch: Callable[[], Soft], timeout_s: float) -> Soft:
    """What ``fetch`` gives, asked again while some of its examples are not labelled yet.

    No look is begun after ``timeout_s`` seconds.

    Raises:
        RowsMissing: some ids are unknown to the label set, so no waiting brings them.
        DeadlineExceeded: some are still not labelled; chained to the `RowsMissing` that names them.
    """
    deadline, pause_s = Deadline(timeout_s), FIRST_PAUSE_S
    while True:
        try:
            return fetch()
        except RowsMissing as error:
            if error.unknown:
                raise
            if not deadline.remaining_s:
                raise DeadlineExceeded(
                    f"waited {timeout_s:g} s for labels, and still {error.message}; is anybody labelling? "
                    "connect with a larger timeout_s to wait longer"
                ) from error
        time.sleep(min(pause_s, deadline.remaining_s))
        pause_s = min(2 * pause_s, MOST_PAUSE_S)
