"""Wishes: what servers that do not run the store's jobs were asked, left for the one that does.

A wish is a file, ``STORE/.jobs/inbox/TIME-*.json``, durable before it is acknowledged and removed once the job that it
is about was written down. Whoever tells how jobs stand applies those that are left, as the server that runs them will.
"""

import contextlib
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from logitcache.labels.errors import StorageFault
from logitcache.server.jobs.folder import MOST_BYTES
from logitcache.server.jobs.job import Job, JobRequest
from logitcache.server.jobs.recording import write_json
from logitcache.server.logs import logger
from logitcache.storage.files import Files
from logitcache.storage.reading import is_foreign, names, read_file

_log = logger(__name__)


class Wish(BaseModel):
    """A job is asked for (with its ``request``), or is to be cancelled (without)."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    id: str
    at: AwareDatetime
    request: JobRequest | None = None
    again: bool = False

    @classmethod
    def to_have(cls, request: JobRequest, again: bool, known: Job | None) -> "Wish":
        """Ask for a job. It comes later than when ``known`` was asked for, whatever the clock says."""
        now = datetime.now(UTC)
        at = now if known is None else max(now, known.asked + timedelta(microseconds=1))
        return cls(id=request.job_id, at=at, request=request, again=again)

    @classmethod
    def to_cancel(cls, known: Job) -> "Wish":
        """Cancel a job, as it was asked for last."""
        return cls(id=known.id, at=max(datetime.now(UTC), known.asked))

    def applied(self, job: Job | None) -> Job | None:
        """The job as this leaves it; the very same where it changes nothing, as it does the second time."""
        if self.request is None:
            if job is None or job.asked > self.at:
                return job
            if job.state == "queued":
                return job.over("cancelled", at=self.at)
            return job.cancelling(self.at) if job.state == "running" and job.stop_asked is None else job
        if job is None:
            return Job.of(self.request, self.at)
        settled = job.state in ("queued", "running") or (job.state == "succeeded" and not self.again)
        return job if settled or job.asked >= self.at else job.asked_anew(self.at)


class Inbox:
    """The folder of wishes."""

    def __init__(self, jobs: Path) -> None:
        self._folder = jobs / "inbox"

    def leave(self, wish: Wish) -> None:
        """Write a wish down; it is durable when this returns.

        Raises:
            StorageFault: as `Files` does.
        """
        Files().make_folder(self._folder)
        Files().fsync(self._folder.parent)
        name = f"{round(wish.at.timestamp() * 1e6):020d}-{uuid.uuid4().hex}.json"
        write_json(self._folder / name, wish.model_dump(mode="json"))

    def wishes(self) -> Iterator[tuple[str, Wish]]:
        """Names and wishes, the earliest first. A file that is none is removed; what cannot be read is logged."""
        try:
            left = sorted(name for name in names(self._folder, self._folder) if name.endswith(".json"))
        except StorageFault as error:
            _log.warning("what was asked cannot be read", why=str(error))
            return
        for name in left:
            try:
                yield name, Wish.model_validate_json(read_file(self._folder, self._folder / name, MOST_BYTES))
            except FileNotFoundError:
                continue  # the server that runs the jobs was faster
            except (StorageFault, ValidationError) as error:
                if isinstance(error, StorageFault) and not is_foreign(error):
                    _log.warning("what was asked cannot be read", name=name, why=str(error))
                    continue
                _log.warning("what was asked is nothing that can be, and is dropped", name=name, why=str(error)[:500])
                with contextlib.suppress(StorageFault):
                    self.remove(name)

    def remove(self, name: str) -> None:
        """A wish is fulfilled.

        Raises:
            StorageFault: as `Files` does.
        """
        Files().remove(self._folder / name)
