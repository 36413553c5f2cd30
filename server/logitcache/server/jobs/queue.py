"""The queue: jobs are asked for, take turns, are watched, cancelled, and found again after a restart.

One thread moves every job on. The state files are the truth: what is in memory is written down first, so a server that
ends at any moment leaves a store from which the next one goes on. A lock makes one server of a store the one that runs
its jobs; any other tells how they stand, and takes over when the first is gone. Knows nothing of HTTP.
"""

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from signal import SIGKILL, SIGTERM

from logitcache.labels.errors import (
    InvalidRequest,
    JobNotFound,
    LabelSetLocked,
    LogitcacheError,
    NotRegistered,
    ServerBusy,
    StorageFault,
    Unavailable,
)
from logitcache.server.config import Config
from logitcache.server.jobs import rules
from logitcache.server.jobs.command import arguments, check_registered
from logitcache.server.jobs.folder import FOLDER, JOB_ID, JobFolder, read_jobs
from logitcache.server.jobs.job import STATES, Asked, Job, JobDetail, JobError, State
from logitcache.server.jobs.process import JobProcess
from logitcache.server.jobs.recording import VARIABLE
from logitcache.server.logs import logger
from logitcache.storage.files import Files
from logitcache.storage.lock import WriterLock

POLL_S = 0.2
"""How often running processes are looked at."""

TAKE_OVER_S = 1.0
"""How often a server that does not run the jobs looks whether it should."""

TROUBLE_S = 5.0
"""When to try again after the disk refused to write a job down."""

GRACE_S = 20.0
"""How long a cancelled process may take to end by itself."""

MOST_WAITING = 1000
"""Queued jobs; more are refused."""

MOST_LISTED = 100

_log = logger(__name__)


class Jobs:
    """The jobs of one store, run by what one configuration registers. Safe to use from several threads.

    Raises:
        StorageFault: the store cannot hold a folder for them.
    """

    def __init__(self, store: Path, config: Config, *, grace_s: float = GRACE_S) -> None:
        self._store = store.absolute()
        self._config = config
        self._grace_s = grace_s
        self._folder = self._store / FOLDER
        Files().make_folder(self._folder)
        self._changed = threading.Condition()
        self._lock: WriterLock | None = None
        self._jobs: dict[str, Job] = {}
        self._processes: dict[str, JobProcess] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="logitcache-jobs", daemon=True)

    def start(self) -> None:
        """Take up the jobs that an earlier server left, and begin to run those that wait."""
        with self._changed:
            self._step()
        self._thread.start()

    def close(self) -> None:
        """Stop watching. Processes go on, and the next server finds them."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()
        with self._changed:
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def ask(self, asked: Asked) -> tuple[Job, bool]:
        """The job of a request, and whether asking queued it: it is new, or it had ended and is tried anew.

        Raises:
            InvalidRequest: a value that no precompute would take, or teachers of different devices.
            NotRegistered: a teacher, or its dataset.
            Unavailable: another server runs this store's jobs, or too many wait.
            StorageFault: the job cannot be written down.
        """
        request = asked.request()
        check_registered(request, self._config)
        with self._changed:
            self._check_mine()
            job = self._jobs.get(request.job_id)
            if job is not None and (
                job.state in ("queued", "running") or (job.state == "succeeded" and not asked.again)
            ):
                return job, False
            if self.counts()["queued"] >= MOST_WAITING:
                raise ServerBusy(f"{MOST_WAITING:,} jobs wait already: cancel some, or ask when they are done")
            job = Job.of(request) if job is None else job.queued_anew()
            self._save(job, "job queued")
            self._changed.notify()
            return job, True

    def cancel(self, id: str) -> JobDetail:
        """Take a job out of the queue, or tell its process to stop; one that has ended stays as it is.

        Raises:
            JobNotFound: there is none.
            Unavailable: another server runs this store's jobs.
        """
        with self._changed:
            job = self._find(id)
            self._check_mine()
            if job.state == "queued":
                self._save(job.over("cancelled"), "job cancelled")
            elif job.state == "running" and job.stop_asked is None:
                self._save(job.cancelling(), "job is being cancelled")
                self._processes[id].signal(SIGTERM)
        return self.get(id)

    def get(self, id: str) -> JobDetail:
        """One job, how far it is, and the end of its log.

        Raises:
            JobNotFound: there is none.
        """
        with self._changed:
            job = self._find(id)
        folder = JobFolder(self._folder, id)
        log = [self._without_paths(line) for line in folder.log_tail()]
        return job.detail(None if job.state == "queued" else folder.progress(), log)

    def newest(self) -> list[Job]:
        """The jobs that were asked for last, `MOST_LISTED` at most, newest first."""
        return sorted(self._known().values(), key=lambda job: (job.asked, job.id), reverse=True)[:MOST_LISTED]

    def counts(self) -> dict[State, int]:
        """How many jobs are in each state."""
        found = Counter(job.state for job in self._known().values())
        return {state: found[state] for state in STATES}

    def _known(self) -> Mapping[str, Job]:
        with self._changed:
            return dict(self._jobs) if self._lock is not None else {job.id: job for job in read_jobs(self._folder)}

    def _find(self, id: str) -> Job:
        job = self._known().get(id) if JOB_ID.fullmatch(id) else None
        if job is None:
            raise JobNotFound(f"there is no job {id[:80]!r}; GET /v1/jobs lists those that there are")
        return job

    def _check_mine(self) -> None:
        if self._lock is None:
            raise Unavailable(
                "this server only tells how jobs stand: another server on this store runs them, or it cannot write to "
                "the store, which its log says. Ask the other one, or try again later"
            )

    def _save(self, job: Job, event: str) -> None:
        """Write a job down, then take it for true."""
        try:
            JobFolder(self._folder, job.id).write(job)
        except StorageFault as error:
            # The message goes out over HTTP, without where this machine keeps things.
            _log.error("job cannot be written down", job=job.id, code=error.code, detail=error.message)
            raise type(error)(f"job {job.id} cannot be written down; the server's log has the reason") from error
        self._jobs[job.id] = job
        code = job.error.code if job.error else None
        _log.info(event, job=job.id, label_set=job.request.label_set, state=job.state, attempt=job.attempt, code=code)

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                self._changed.wait(self._step())

    def _step(self) -> float | None:
        """Move every job on as far as it goes now; seconds until there may be more to do."""
        if not self._tried(self._take_over):
            return TROUBLE_S
        if self._lock is None:
            return TAKE_OVER_S
        watched = [self._tried(self._watch, self._jobs[id]) for id in list(self._processes)]
        begun = [self._tried(self._begin, job) for job in rules.due(self._jobs.values(), self._device_of)]
        if not all(watched + begun):
            return TROUBLE_S
        return POLL_S if any(job.state in ("queued", "running") for job in self._jobs.values()) else None

    def _tried(self, act: Callable[..., None], *job: Job) -> bool:
        """Do it, and say whether that went well: one job's trouble neither ends the thread nor holds up other jobs."""
        try:
            act(*job)
        except Exception as error:  # noqa: BLE001 - logged, and tried again
            told = {"job": job[0].id if job else None, "why": str(error), "again_in_s": TROUBLE_S}
            _log.error("jobs cannot go on", **told, exc_info=not isinstance(error, LogitcacheError))
            return False
        return True

    def _take_over(self) -> None:
        """Become the server that runs this store's jobs, unless another one is."""
        if self._lock is not None:
            return
        try:
            lock = WriterLock(self._folder / "lock")
        except LabelSetLocked:
            return
        try:
            self._jobs = {job.id: job for job in read_jobs(self._folder)}
        except BaseException:
            lock.release()
            raise
        self._lock = lock
        # Whether they live or have ended, they are watched like any other.
        self._processes = {job.id: JobProcess(job.process) for job in self._jobs.values() if job.process}
        for id, process in self._processes.items():
            _log.info("job found again", job=id, alive=process.is_alive())
            if self._jobs[id].stop_asked:
                process.signal(SIGTERM)

    def _watch(self, job: Job) -> None:
        process = self._processes[job.id]
        if not process.is_alive():
            process.clear_away()
            self._end(job, process.exit_code)
            del self._processes[job.id]
        elif job.stop_asked and (datetime.now(UTC) - job.stop_asked).total_seconds() > self._grace_s:
            process.signal(SIGKILL)

    def _end(self, job: Job, exit_code: int | None) -> None:
        job = rules.ended(job, JobFolder(self._folder, job.id).outcome(), exit_code)
        if job.error is not None:
            error = JobError(code=job.error.code, message=self._without_paths(job.error.message))
            job = job.model_copy(update={"error": error})
        self._save(job, "job ended" if job.ended else "job was lost, and is queued anew")

    def _begin(self, job: Job) -> None:
        folder = JobFolder(self._folder, job.id)
        try:
            words = arguments(job.request, self._config, self._store)
            folder.clear(job.attempt)
            process = JobProcess.begin(words, self._config.folder, folder.log, {VARIABLE: str(folder.path)})
        except (NotRegistered, InvalidRequest) as error:
            self._save(job.over("failed", error=JobError(code=error.code, message=error.message)), "job cannot begin")
            return
        except OSError as error:
            refused = JobError(code="server-fault", message=f"its process could not begin: {error.strerror}")
            self._save(job.over("failed", error=refused), "job cannot begin")
            return
        try:
            self._save(job.running(process.id, self._device_of(job)), "job began")
        except BaseException:
            process.give_up()
            raise
        self._processes[job.id] = process
        process.go()

    def _device_of(self, job: Job) -> str:
        # Those of an ensemble have the same, or it cannot begin.
        teacher = self._config.teachers.get(job.request.teachers[0])
        return (teacher and teacher.device) or rules.DEFAULT_DEVICE

    def _without_paths(self, text: str) -> str:
        """What a process said, without where this machine keeps things: it goes out over HTTP."""
        for folder in (self._store, self._config.folder):
            if folder.name:
                text = text.replace(str(folder), folder.name)
        return text
