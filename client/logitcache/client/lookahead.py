"""How many batches ahead labels are asked for: a number that was given, or one that grows where steps wait.

It knows nothing of loaders, labels or threads, only what `attach` tells it of each step.
"""

from collections import deque

from logitcache.labels.errors import InvalidRequest

FIRST_DEPTH = 2
"""Batches ahead before anything is known of the steps."""

MOST_AHEAD = 16
"""Depth that it does not grow beyond, because the batches themselves are held, too."""

WAIT_MS = 0.1
"""What counts as waiting. Labels that are there are taken in some microseconds."""

ANSWERS_KEPT = 32
"""Answers that the next ones are taken to be no larger than."""

BUFFER_BYTES = 256 * 2**20
"""Unless told otherwise, bytes of labels that may be held or under way."""


class Lookahead:
    """How deep to fetch, and what of the steps says so.

    A given depth stays. Otherwise it begins at `FIRST_DEPTH`, and grows by one where a step waited although all labels
    that the depth allows to ask for had been there at some step since it grew last: asking earlier helps only where the
    fetching has run out of work. Labels that are slower than the steps at any depth so leave it as it is, and so do
    waits for the first batches.

    It falls only where the label bytes would pass ``buffer_bytes``, and never below 1. That it does not fall after many
    steps without a wait is meant: it saved nothing but memory that is bounded, and the rare slow answer for which it
    grew would be waited for each time.
    """

    def __init__(self, depth: int | None, buffer_bytes: int) -> None:
        if depth is not None and depth < 0:
            raise InvalidRequest(f"depth={depth} is below 0: give the number of batches to fetch labels for ahead")
        if buffer_bytes < 1:
            raise InvalidRequest(f"buffer_bytes={buffer_bytes} holds no labels: give the bytes that may be held ahead")
        self.adapts = depth is None
        self.depth = FIRST_DEPTH if depth is None else depth
        self._most = MOST_AHEAD
        self._buffer_bytes = buffer_bytes
        self._arrived: deque[int] = deque()  # written by the thread that fetches; a lock could be held at a fork
        self._sizes: deque[int] = deque(maxlen=ANSWERS_KEPT)
        self._ran_out = False

    def arrived(self, held_bytes: int) -> None:
        """Labels of so many bytes are there. Any thread may say so."""
        if self.adapts:
            self._arrived.append(held_bytes)

    def step_begins(self, ahead: int, *, all_there: bool) -> None:
        """Labels of so many batches, from this step's on, were asked for before, and whether all of them are there."""
        while self._arrived:
            self._sizes.append(self._arrived.popleft())
        if self._sizes:
            held = self._buffer_bytes // max(1, *self._sizes)  # this step's labels are held, too
            self._most = max(1, min(MOST_AHEAD, held - 1))
        if self.depth > self._most:
            self.depth, self._ran_out = self._most, False
        if all_there and ahead >= self.depth:
            self._ran_out = True

    def step_waited(self, milliseconds: float) -> None:
        """A step waited so long for its labels, its batch and those ahead being there."""
        if self._ran_out and milliseconds > WAIT_MS and self.depth < self._most:
            self.depth, self._ran_out = self.depth + 1, False
