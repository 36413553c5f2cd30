"""A job's folder, ``STORE/.jobs/ID``: what is written there, and what is read back.

| file | writer | |
| --- | --- | --- |
| ``job.json`` | the server | the job; replaced durably at every step |
| ``log.txt`` | the process | what it printed, one attempt after another |
| ``progress.json`` | the process | how far it is, replaced twice a second at most |
| ``under-way.txt`` | the process | what it does at this moment |
| ``outcome.json`` | the process | how it ended; replaced durably |
| ``traceback.txt`` | the process | where it failed; never told over HTTP |
| ``alive.lock`` | the process | locked while it lives |
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from logitcache.labels.errors import StorageFault
from logitcache.server.jobs.job import Job, Outcome, Progress
from logitcache.server.jobs.recording import OUTCOME, PROGRESS, is_alive, write_json
from logitcache.server.logs import logger
from logitcache.server.under_way import NAME as UNDER_WAY
from logitcache.server.under_way import last_under_way
from logitcache.storage.files import Files
from logitcache.storage.reading import is_foreign, names, open_file, read_file, refuse_links

FOLDER = ".jobs"
"""In the store; no label set can have this name."""

JOB = "job.json"

TAIL_LINES, TAIL_BYTES = 50, 16 << 10
"""How much of a log is told."""

JOB_ID = re.compile(r"[0-9a-f]{16}")

MOST_BYTES = 1 << 20
"""Of a file that is read as a whole, a wish among them: the body that asks for a job is far shorter."""

_log = logger(__name__)

Model = TypeVar("Model", bound=BaseModel)


class JobFolder:
    """One job's files."""

    def __init__(self, jobs: Path, id: str) -> None:
        self._jobs, self.path = jobs, jobs / id

    @property
    def log(self) -> Path:
        """What its process printed."""
        return self.path / "log.txt"

    def write(self, job: Job) -> None:
        """Write the job down; it is durable when this returns.

        Raises:
            StorageFault: as `Files` does.
        """
        Files().make_folder(self.path)
        Files().fsync(self.path.parent)  # a killed server may have made it, and not synced its name
        write_json(self.path / JOB, job.model_dump(mode="json"))

    def clear(self, attempt: int) -> None:
        """Forget how an earlier attempt went, but for its log: in it the next one begins under a heading.

        Raises:
            OSError, StorageFault: the log cannot be written, or a file not be removed; or the folder is a symbolic link
                or holds one: what is written there is not to go elsewhere.
        """
        refuse_links(self.path)
        for name in (OUTCOME, PROGRESS, UNDER_WAY):
            Files().remove(self.path / name)
        if attempt > 1:
            with self.log.open("a") as log:
                log.write(f"--- attempt {attempt}\n")

    def remove(self) -> None:
        """Forget the job, with its log.

        Raises:
            StorageFault: as `Files` does.
        """
        # This first: without it there is no job, whatever is left of the folder.
        Files().remove(self.path / JOB)
        Files().fsync(self.path)
        shutil.rmtree(self.path, ignore_errors=True)

    def read(self) -> Job | None:
        """The job; None where a crash left a folder without one, or a file that no server of this version wrote.

        Raises:
            StorageFault: it cannot be read, which says nothing of what it is.
        """
        job = self._read(JOB, Job)
        return job if job is not None and job.id == self.path.name else None

    def progress(self) -> Progress | None:
        """How far its process is, or was at its end; None where that cannot be read."""
        try:
            return self._read(PROGRESS, Progress)
        except StorageFault:
            return None

    def outcome(self) -> Outcome | None:
        """How its process ended; None if it could not say.

        Raises:
            StorageFault: it cannot be read.
        """
        return self._read(OUTCOME, Outcome)

    def under_way(self) -> str:
        """What its process was doing when it ended; empty where that is not known."""
        return last_under_way(self.path)

    def is_alive(self) -> bool:
        """Does a process of it live, even one whose number means nothing here?

        Raises:
            StorageFault: that cannot be found out.
        """
        return self.path.is_dir() and is_alive(self.path)

    def log_tail(self) -> list[str]:
        """The last lines of its log: `TAIL_LINES` and `TAIL_BYTES` at most."""
        try:
            with os.fdopen(open_file(self._jobs, self.log), "rb") as file:
                size = file.seek(0, os.SEEK_END)
                start = file.seek(max(0, size - TAIL_BYTES))
                lines = file.read(TAIL_BYTES).decode(errors="replace").splitlines()
        except (OSError, StorageFault):
            return []
        # The first may have been cut in two; a single one is all there is.
        return (lines[1:] if start and len(lines) > 1 else lines)[-TAIL_LINES:]

    def _read(self, name: str, kind: type[Model]) -> Model | None:
        path = self.path / name
        try:
            return kind.model_validate_json(read_file(self._jobs, path, MOST_BYTES))
        except FileNotFoundError:
            return None
        except (StorageFault, ValidationError) as error:
            if isinstance(error, StorageFault) and not is_foreign(error):
                raise
            _log.warning("job file cannot be read", path=str(path), why=str(error)[:500])
            return None


def read_jobs(jobs: Path) -> Iterator[Job]:
    """Every job of a store, in no order.

    Raises:
        StorageFault: one of them cannot be read.
    """
    for name in names(jobs, jobs):
        if JOB_ID.fullmatch(name) and (job := JobFolder(jobs, name).read()) is not None:
            yield job
