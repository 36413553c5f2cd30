"""Whether stored rows are in memory or on the disk, as far as gathering them tells. It reads no rows itself.

Rows are asked for in random order, so the kernel does not read ahead, and each page that is not in memory is waited for
alone. Asking for all pages of a batch first makes that one wait; where they are in memory it only costs. So it is done
while gathering shows that it is needed.
"""

import resource

WARM_BYTES_PER_S = 400e6
"""Rows in memory are copied faster than this, even out of their order; rows on a disk more slowly."""

FIXED_S = 200e-6
"""What a gather may take whatever its size."""

FEW_FAULTS = 8
"""Pages that a process reads from the disk now and then for other reasons."""


class Paging:
    """What is known of a label set's pages: cold until a gather was fast. Threads that race cost one batch's advice."""

    def __init__(self) -> None:
        self.cold = True
        self._faults = 0

    def note(self, seconds: float, nbytes: int) -> None:
        """Gathering ``nbytes`` took so long; their pages were asked for before if they were `cold`."""
        slow = seconds > FIXED_S + nbytes / WARM_BYTES_PER_S
        if slow != self.cold:
            # Other threads may have had the processor: only pages that were read since the last change tell.
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
            self.cold, self._faults = slow and faults - self._faults > FEW_FAULTS, faults
