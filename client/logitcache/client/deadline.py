"""A deadline: the total time that one call may take, retries included.

It knows only the clock. The transport asks it before every read and write, so that a server that sends one byte a
second cannot stretch a call: the timeouts of HTTP libraries begin anew with each byte.
"""

import time

from logitcache.labels.errors import InvalidRequest

LONGEST_S = 1e6
"""Most seconds that a call may take: eleven days. Clocks and sockets take no infinity."""


class Deadline:
    """A moment ``timeout_s`` seconds after this object was made.

    Raises:
        InvalidRequest: ``timeout_s`` is not a number above 0, or beyond `LONGEST_S`.
    """

    def __init__(self, timeout_s: float) -> None:
        if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 < timeout_s <= LONGEST_S:
            raise InvalidRequest(f"timeout_s={timeout_s!r} is not a number of seconds above 0 and up to {LONGEST_S:g}")
        self.timeout_s = float(timeout_s)
        self._end_s = time.monotonic() + self.timeout_s

    @property
    def remaining_s(self) -> float:
        """Seconds that are left; 0 when it is over."""
        return max(0.0, self._end_s - time.monotonic())
