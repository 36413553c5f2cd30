"""What of `Labels` belongs to one process: the open reader, what is known of the label set, the counts.

A forked DataLoader worker has a copy of it that it must not touch; it makes its own. It knows nothing of HTTP or files.
"""

import os
import threading

from logitcache.client.stats import Tally
from logitcache.labels.label_set import Description, LabelSet


class InProcess:
    """What belongs to one process and must not be used by a fork of it."""

    def __init__(self, inherited: "InProcess | None" = None) -> None:
        self.pid = os.getpid()
        self.lock = threading.Lock()  # a lock that a thread of the parent held would never be released here
        self.reader: LabelSet | None = None
        self.described: Description | None = None  # as it was when this process last checked it
        self.tally = Tally()
        self.inherited = inherited  # kept alive: collecting it would close sockets and mappings of the parent's reader
