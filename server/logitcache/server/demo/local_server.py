"""A ``logitcache serve`` process of its own for as long as a context lasts, as a user would run it.

A process and not a thread: a server that shared this process's interpreter lock would slow what is measured.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import IO

from logitcache.labels.errors import ServerFault


@contextmanager
def serving(store: Path, log: Path) -> Iterator[str]:
    """Serve a store on a free port of this machine; what the server logs goes into ``log``.

    Yields:
        The server's base URL, once it answers.

    Raises:
        ServerFault: it ended before it answered; its last line is in the message.
    """
    command = [sys.executable, "-m", "logitcache.server", "serve", "--store", str(store), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:  # noqa: S603 - our own interpreter and module
        assert process.stderr is not None
        heard: SimpleQueue[tuple[str | None, str]] = SimpleQueue()
        listener = threading.Thread(target=_listen, args=(process.stderr, log, heard), daemon=True)
        listener.start()
        try:
            url, last_line = heard.get()
            if url is None:
                raise ServerFault(f"the server did not start: {last_line}; see {log}")
            yield url
        finally:
            process.terminate()
            listener.join()


def _listen(lines: IO[str], log: Path, heard: SimpleQueue[tuple[str | None, str]]) -> None:
    """Copy the server's log; say the URL when a line names it, and the last line at the end."""
    last_line = "it said nothing"
    with log.open("w") as copy:
        for line in lines:
            copy.write(line)
            copy.flush()
            last_line = line.strip()
            if url := _url_in(line):
                heard.put((url, last_line))
    heard.put((None, last_line))


def _url_in(line: str) -> str | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event.get("url") if isinstance(event, dict) else None
