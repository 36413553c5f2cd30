"""The process of a job: begun in a session of its own, so that it outlives the server, and found again by the next one.

Knows processes, not jobs. A process is told from another of the same number by when it began.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from logitcache.server.jobs.job import ProcessId
from logitcache.server.jobs.recording import GO

COMMAND = (sys.executable, "-P", "-m", "logitcache.server")
"""The command line, without the working folder in front of the modules that it needs itself."""


class JobProcess:
    """A process that was begun here, or by a server before this one."""

    def __init__(self, id: ProcessId, child: "subprocess.Popen[bytes] | None" = None) -> None:
        self.id = id
        self._child = child
        self._was_alive = child is not None

    @classmethod
    def begin(cls, arguments: Sequence[str], folder: Path, log: Path, environment: dict[str, str]) -> "JobProcess":
        """Start ``logitcache`` with these arguments in ``folder``; it does nothing before `go`.

        Raises:
            OSError: the log cannot be written, the folder is not there, or the system has no room for a process.
        """
        with log.open("ab") as output:
            child = subprocess.Popen(  # noqa: S603 - words of the configuration and checked numbers, and no shell
                [*COMMAND, *arguments],
                cwd=folder,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        # Not yet waited for, so it is in /proc even if it has ended already.
        return cls(ProcessId(pid=child.pid, began=_began(child.pid) or "unknown"), child)

    def go(self) -> None:
        """Let it begin its work."""
        self._close(GO)

    def give_up(self) -> None:
        """Send it away before it has begun, and wait until it is gone."""
        self._close("")
        if self._child is not None:
            self._child.kill()
            self._child.wait()

    def _close(self, last: str) -> None:
        if self._child is not None and self._child.stdin is not None:
            # It may be dead already, which whoever watches it finds out.
            with contextlib.suppress(OSError), self._child.stdin as stdin:
                stdin.write(last.encode())

    def is_alive(self) -> bool:
        """It has not ended. One that has is waited for, if it was begun here."""
        if self._child is not None:
            return self._child.poll() is None
        alive = _began(self.id.pid) == self.id.began
        self._was_alive |= alive
        return alive

    @property
    def exit_code(self) -> int | None:
        """How it ended, negative for a signal; None if it has not, or was begun by another server."""
        return self._child.returncode if self._child is not None else None

    def clear_away(self) -> None:
        """Kill what it left behind when it ended, if that was seen here: it may hold memory, or the device."""
        # The number of a group is given to no new process: while none has it, the group can only be its own.
        if self._was_alive and _began(self.id.pid) is None:
            _signal_group(self.id.pid, signal.SIGKILL)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to it and to the processes that it began; nothing if it has ended."""
        if self.is_alive():
            _signal_group(self.id.pid, number)


def _signal_group(group: int, number: signal.Signals) -> None:
    # Nothing may be left of it, or only what took another user's rights.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _began(pid: int) -> str | None:
    """When a process began: the machine's boot and clock ticks since; None if it is not there, or dead and unburied."""
    try:
        # The name in the second field may hold spaces and parentheses; what follows it never does.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else f"{_boot()}/{fields[18]}"


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
