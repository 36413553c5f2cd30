"""A lock for each name, so that whoever is busy with one keeps nobody waiting for another."""

import threading
from weakref import WeakValueDictionary


class NameLocks:
    """Locks by name, each there as long as somebody holds or awaits it. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock, self._locks = threading.Lock(), WeakValueDictionary[str, threading.Lock]()

    def of(self, name: str) -> threading.Lock:
        """The lock of a name, the same one for everybody who has it at the time."""
        with self._lock:
            return self._locks.setdefault(name, threading.Lock())
