"""The queue: jobs are asked for, take turns, are watched, cancelled, and found again after a restart.

One thread moves every job on. The state files are the truth: what is in memory is written down first, so a server that
ends at any moment leaves a store from which the next one goes on. A lock makes one server of a store, and of its
processes one, that which runs its jobs. Any other tells how they stand, leaves what it is asked for that one to do, and
takes over when it is gone. Knows nothing of HTTP.
"""

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from errno import EAGAIN, EMFILE, ENFILE, ENOMEM
from functools import partial
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
from logitcache.server.jobs.inbox import Inbox, Wish
from logitcache.server.jobs.job import STATES, Asked, Job, JobDetail, JobError, Outcome, State
from logitcache.server.jobs.process import JobProcess
from logitcache.server.jobs.recording import VARIABLE
from logitcache.server.logs import logger
from logitcache.storage.files import Files
from logitcache.storage.lock import WriterLock
from logitcache.storage.places import Places
from logitcache.storage.records import numbered

POLL_S = 0.2
"""How often running processes are looked at."""

LOOK_S = 0.5
"""How often the server that runs the jobs looks what others were asked, and these look whether it is still there."""

TROUBLE_S = 5.0
"""When to try again after the disk refused to write a job down."""

PASSING = frozenset({EAGAIN, EMFILE, ENFILE, ENOMEM})
"""What the system has too few of at this moment for a process to begin: the job waits until there is room."""

GRACE_S = 20.0
"""How long a cancelled process may take to end by itself."""

MOST_WAITING = 1000
"""Queued jobs; more are refused."""

MOST_LISTED = 100

_CODE = Path(__file__).parents[4]
"""Where logitcache is installed."""

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
        Files().fsync(self._store)
        self._inbox = Inbox(self._folder)
        self._hidden = [folder for folder in (self._store, config.folder, Path(sys.prefix), _CODE) if folder.name]
        self._changed = threading.Condition()
        self._lock: WriterLock | None = None
        self._jobs: dict[str, Job] = {}
        self._processes: dict[str, JobProcess] = {}
        self._closed = self._troubled = False
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
            Unavailable: this server cannot write to the store, or too many jobs wait.
            StorageFault: the job cannot be written down.
        """
        request = asked.request()
        check_registered(request, self._config)
        with self._changed:
            known = self._known(request.job_id)
            wish = Wish.to_have(request, asked.again, known)
            job = wish.applied(known)
            if job is None or job is known:
                return known or Job.of(request), False
            self._check_untroubled()
            if self.counts()["queued"] >= MOST_WAITING:
                raise ServerBusy(f"{MOST_WAITING:,} jobs wait already: cancel some, or ask when they are done")
            self._take(wish)
            return job, True

    def cancel(self, id: str) -> JobDetail:
        """Take a job out of the queue, or tell its process to stop; one that has ended stays as it is.

        Raises:
            JobNotFound: there is none.
            Unavailable: this server cannot write to the store.
            StorageFault: it cannot be written down.
        """
        with self._changed:
            job = self._find(id)
            wish = Wish.to_cancel(job)
            if wish.applied(job) is not job:
                self._check_untroubled()
                self._take(wish)
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
        return sorted(self._all(), key=lambda job: (job.asked, job.id), reverse=True)[:MOST_LISTED]

    def counts(self) -> dict[State, int]:
        """How many jobs are in each state."""
        found = Counter(job.state for job in self._all())
        return {state: found[state] for state in STATES}

    def _all(self) -> Iterable[Job]:
        """Every job as it stands once all that was wished is done."""
        # The wishes first: one that is fulfilled meanwhile is in the jobs by then, and changes nothing twice.
        wishes = [wish for _, wish in self._inbox.wishes()]
        with self._changed:
            jobs = dict(self._jobs) if self._lock is not None else {job.id: job for job in read_jobs(self._folder)}
        for wish in wishes:
            if (job := wish.applied(jobs.get(wish.id))) is not None:
                jobs[wish.id] = job
        return jobs.values()

    def _known(self, id: str) -> Job | None:
        """One job likewise."""
        wishes = [wish for _, wish in self._inbox.wishes() if wish.id == id]
        with self._changed:
            job = self._jobs.get(id) if self._lock is not None else JobFolder(self._folder, id).read()
        for wish in wishes:
            job = wish.applied(job)
        return job

    def _find(self, id: str) -> Job:
        job = self._known(id) if JOB_ID.fullmatch(id) else None
        if job is None:
            raise JobNotFound(f"there is no job {id[:80]!r}; GET /v1/jobs lists those that there are")
        return job

    def _check_untroubled(self) -> None:
        if self._troubled:
            raise Unavailable(
                "this server only tells how jobs stand: it cannot write to the store, which its log says. Try again "
                "later"
            )

    def _take(self, wish: Wish) -> None:
        """Do what is wished, or leave it for the server that runs the jobs."""
        if self._lock is not None:
            # What others were asked before is done before.
            for name, earlier in self._inbox.wishes():
                self._fulfil(earlier, name)
            self._fulfil(wish)
            self._changed.notify()
            return
        try:
            self._inbox.leave(wish)
        except StorageFault as error:
            raise self._not_written(wish.id, error) from error
        _log.info("job left for the server that runs them", job=wish.id, cancel=wish.request is None)

    def _fulfil(self, wish: Wish, name: str | None = None) -> None:
        """Do what is wished, and remove the file of that ``name`` in which it was left."""
        known = self._jobs.get(wish.id)
        job = wish.applied(known)
        if job is not None and job is not known:
            self._save(job, "job is being cancelled" if job.stop_asked else f"job {job.state}")
            if job.stop_asked:
                self._processes[job.id].signal(SIGTERM)
        if name is not None:
            self._inbox.remove(name)

    def _save(self, job: Job, event: str) -> None:
        """Write a job down, then take it for true."""
        try:
            JobFolder(self._folder, job.id).write(job)
        except StorageFault as error:
            raise self._not_written(job.id, error) from error
        self._jobs[job.id] = job
        code = job.error.code if job.error else None
        _log.info(event, job=job.id, label_set=job.request.label_set, state=job.state, attempt=job.attempt, code=code)

    def _not_written(self, id: str, error: StorageFault) -> StorageFault:
        # The message goes out over HTTP, without where this machine keeps things.
        _log.error("job cannot be written down", job=id, code=error.code, detail=error.message)
        return type(error)(f"job {id} cannot be written down; the server's log has the reason")

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                self._changed.wait(self._step())

    def _step(self) -> float:
        """Move every job on as far as it goes now; seconds until there may be more to do, whatever happened."""
        pauses = [TROUBLE_S]
        self._tried(lambda: pauses.append(self._move_on()))
        return pauses[-1]

    def _move_on(self) -> float:
        self._troubled = not self._tried(self._take_over)
        if self._troubled:
            return TROUBLE_S
        if self._lock is None:
            return LOOK_S
        went_well = [self._tried(partial(self._fulfil, wish, name), wish.id) for name, wish in self._inbox.wishes()]
        went_well += [self._tried(partial(self._watch, self._jobs[id]), id) for id in list(self._processes)]
        due = rules.due(self._jobs.values(), self._device_of)
        went_well += [self._tried(partial(self._begin, job), job.id) for job in due]
        old = rules.prunable(self._jobs.values(), self._config.jobs.keep)
        went_well += [self._tried(partial(self._forget, job), job.id) for job in old]
        if not all(went_well):
            return TROUBLE_S
        return POLL_S if any(job.ended is None for job in self._jobs.values()) else LOOK_S

    def _tried(self, act: Callable[[], None], id: str | None = None) -> bool:
        """Do it, and say whether that went well: one job's trouble neither ends the thread nor holds up other jobs."""
        try:
            act()
        except Exception as error:  # noqa: BLE001 - logged, and tried again
            told = {"job": id, "why": str(error), "again_in_s": TROUBLE_S}
            _log.error("jobs cannot go on", **told, exc_info=not isinstance(error, LogitcacheError))
            return False
        return True

    def _forget(self, job: Job) -> None:
        JobFolder(self._folder, job.id).remove()
        del self._jobs[job.id]
        _log.info("job is forgotten, being old", job=job.id, label_set=job.request.label_set)

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
        process, folder = self._processes[job.id], JobFolder(self._folder, job.id)
        if process.is_alive():
            if job.stop_asked and (datetime.now(UTC) - job.stop_asked).total_seconds() > self._grace_s:
                process.signal(SIGKILL)
            return
        process.clear_away()
        if not folder.is_alive():
            end = rules.End(folder.outcome(), process.exit_code, folder.under_way(), self._committed(job))
            self._end(job, end)
            del self._processes[job.id]

    def _end(self, job: Job, end: rules.End) -> None:
        if end.outcome is not None and (said := end.outcome.error) is not None:
            error = JobError(code=said.code, message=self._without_paths(said.message))
            end = replace(end, outcome=Outcome(error=error))
        job = rules.ended(job, end, self._config.jobs)
        self._save(job, "job ended" if job.ended else "job died, and is queued anew")

    def _committed(self, job: Job) -> int:
        return len(numbered(Places(self._store / job.request.label_set).commits))

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
            if error.errno in PASSING:
                raise
            refused = JobError(code="server-fault", message=f"its process could not begin: {error.strerror}")
            self._save(job.over("failed", error=refused), "job cannot begin")
            return
        try:
            self._save(job.running(process.id, self._device_of(job), self._committed(job)), "job began")
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
        for folder in self._hidden:
            text = text.replace(str(folder), folder.name)
        return text
