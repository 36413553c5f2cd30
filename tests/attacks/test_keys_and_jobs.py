"""Hostile files of keys and jobs, and hostile keys: nobody is let in, nothing outside the store is told or written."""

import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tests.attacks.bounded import said_apart

from logitcache.labels.errors import KeyRefused, LogitcacheError, StorageFault
from logitcache.server.http.access import Access
from logitcache.server.jobs.folder import FOLDER, JOB, JobFolder, read_jobs
from logitcache.server.jobs.inbox import Inbox, Wish
from logitcache.server.jobs.job import Asked, Job, ProcessId
from logitcache.server.jobs.recording import OUTCOME, PROGRESS, write_json
from logitcache.server.keys import Keys, KnownKeys

SEED, CHANGED = 20261125, 300
"""Of the changes in the default suite, of each kind. The proof makes 50,000 from the next seed."""

SECRET = "what stands outside the store"

REQUEST = Asked(label_set="digits", teacher="resnet", dataset="train", top_k=3).request()


def link(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def link_to_a_pipe(path: Path, outside: Path) -> None:
    os.mkfifo(outside.with_name("pipe"))
    path.symlink_to(outside.with_name("pipe"))


def pipe(path: Path, _outside: Path) -> None:
    os.mkfifo(path)


def folder(path: Path, _outside: Path) -> None:
    path.mkdir()


def terabyte(path: Path, _outside: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def endless(path: Path, _outside: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path, _outside: Path) -> None:
    path.symlink_to(path)


Hostile = Callable[[Path, Path], None]

HOSTILE: list[Hostile] = [link, link_to_a_pipe, pipe, folder, terabyte, endless, loop]
"""What may stand where a file should; each is given the place, and a file outside the store."""


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    path = tmp_path / "outside.json"
    path.write_text(json.dumps({"name": "x", "scope": "admin", "sha256": "0" * 64, "made": 1.0, "note": SECRET}))
    return path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "store"
    path.mkdir()
    return path


@pytest.mark.parametrize("put", HOSTILE)
def test_what_is_no_file_in_the_folder_of_keys_lets_nobody_in_and_is_named(
    store: Path, outside: Path, put: Hostile
) -> None:
    secret = Keys(store).make("good", "read")
    put(store / ".keys" / "bad.json", outside)
    known = KnownKeys(Keys(store))
    with pytest.raises(StorageFault, match=r"bad\.json") as raised:
        known.read_again()
    assert SECRET not in str(raised.value)
    with pytest.raises(LogitcacheError):
        known.find(secret)


def test_a_folder_of_keys_that_is_a_link_lets_nobody_in(store: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    Keys(tmp_path / "theirs").make("theirs", "admin")
    (store / ".keys").symlink_to(tmp_path / "theirs" / ".keys")
    with pytest.raises(StorageFault, match="symbolic link"):
        Keys(store).read()
    with pytest.raises(StorageFault, match="symbolic link"):
        Keys(store).make("mine", "admin")
    assert [path.name for path in (tmp_path / "theirs" / ".keys").iterdir()] == ["theirs.json"]


def test_the_store_itself_may_be_a_link(store: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(store)
    keys = Keys(tmp_path / "linked")
    secret = keys.make("good", "read")
    known = KnownKeys(keys)
    known.read_again()
    assert known.find(secret) is not None
    (store / FOLDER).mkdir()
    JobFolder(tmp_path / "linked" / FOLDER, REQUEST.job_id).write(Job.of(REQUEST, datetime.now(UTC)))
    assert [job.id for job in read_jobs(tmp_path / "linked" / FOLDER)] == [REQUEST.job_id]


def test_a_key_under_another_name_than_its_own_is_refused_since_nobody_could_revoke_it(store: Path) -> None:
    Keys(store).make("trainer", "read")
    (store / ".keys" / "trainer.json").rename(store / ".keys" / "other.json")
    with pytest.raises(StorageFault, match=r"other\.json holds no key of that name"):
        Keys(store).read()


@pytest.mark.parametrize("put", HOSTILE)
@pytest.mark.parametrize("name", [JOB, OUTCOME, PROGRESS, "log.txt", "under-way.txt"])
def test_what_is_no_file_in_a_jobs_folder_is_neither_read_nor_waited_for(
    store: Path, outside: Path, put: Hostile, name: str
) -> None:
    outside.write_text(SECRET)
    jobs = store / FOLDER
    jobs.mkdir()
    good, bad = JobFolder(jobs, "0" * 16), JobFolder(jobs, REQUEST.job_id)
    bad.write(Job.of(REQUEST, datetime.now(UTC)))
    (bad.path / name).unlink(missing_ok=True)
    put(bad.path / name, outside)
    good.write(Job.of(REQUEST, datetime.now(UTC)).model_copy(update={"id": "0" * 16}))
    assert good.read() in list(read_jobs(jobs))
    told = [bad.read(), bad.outcome(), bad.progress(), bad.under_way(), *bad.log_tail()]
    assert (bad.read() is None) == (name == JOB)
    assert SECRET not in str(told)
    assert told[1:] == [None, None, ""] or name == "log.txt"


@pytest.mark.parametrize("name", ["log.txt", OUTCOME, "traceback.txt"])
def test_a_job_whose_folder_holds_a_link_is_not_begun(store: Path, outside: Path, name: str) -> None:
    before = outside.read_bytes()
    (store / FOLDER).mkdir()
    bad = JobFolder(store / FOLDER, REQUEST.job_id)
    bad.write(Job.of(REQUEST, datetime.now(UTC)))
    (bad.path / name).symlink_to(outside)
    with pytest.raises(StorageFault, match="symbolic link"):
        bad.clear(2)
    assert outside.read_bytes() == before


@pytest.mark.parametrize("put", HOSTILE)
def test_what_is_no_wish_in_the_inbox_is_dropped_and_the_others_are_heard(
    store: Path, outside: Path, put: Hostile
) -> None:
    outside.write_text(SECRET)
    inbox = Inbox(store)
    wish = Wish.to_have(REQUEST, again=False, known=None)
    inbox.leave(wish)
    put(store / "inbox" / "0.json", outside)
    for _ in range(2):
        assert [found for _, found in inbox.wishes()] == [wish]
    assert outside.read_text() == SECRET


PIECES = [
    *(
        b'"',
        b"{",
        b"}",
        b",",
        b"[",
        b"0",
        b"9" * 400,
        b"null",
        b"-1",
        b"1e999",
        b"admin",
        b"\x00",
        b"\xff",
        b" ",
        b"\n",
    ),
    *(b"\n", b" " * 5000),
]


def changed(draw: random.Random, content: bytes) -> bytes:
    """Bytes with some put in, cut out or exchanged."""
    for _ in range(draw.choice((1, 1, 2, 5))):
        at = draw.randrange(len(content) + 1)
        until = min(len(content), at + draw.choice((0, 1, 1, 4, 40)))
        put = draw.choice((*PIECES, draw.randbytes(1), content[at:until] * 2))
        content = content[:at] + put + content[until:]
    return content


def raised_by(act: Callable[[], None]) -> LogitcacheError | None:
    try:
        act()
    except LogitcacheError as error:
        return error
    return None


def fuzz_key_files(store: Path, draw: random.Random, count: int) -> Counter[str]:
    """Change a key's file so often: it is refused, or is a key of its name that nothing else opens."""
    secret = Keys(store).make("trainer", "read")
    path, found = store / ".keys" / "trainer.json", Counter[str]()
    sound = path.read_bytes()
    for _ in range(count):
        path.write_bytes(changed(draw, sound))
        known = KnownKeys(Keys(store))
        refused = raised_by(known.read_again)
        if refused is not None:
            assert isinstance(refused, StorageFault)
            assert str(path) in refused.message
            found["refused"] += 1
            continue
        (key,) = Keys(store).read()
        assert key.name == "trainer"
        assert (known.find(secret) is not None) == (key.sha256.encode() in sound)
        assert known.find(secret + "x") is None
        found["taken"] += 1
    Keys(store).revoke("trainer")
    return found


def fuzz_presented_keys(store: Path, draw: random.Random, count: int) -> Counter[str]:
    """Change what is sent as a key so often: it is let in where it is the key, and refused elsewhere."""
    secret = Keys(store).make("trainer", "read")
    known, found = KnownKeys(Keys(store)), Counter[str]()
    sound = b"Bearer " + secret.encode()
    for _ in range(count):
        if known.are_old:
            known.read_again()
        header = changed(draw, sound)
        kind, _, sent = header[:200].partition(b" ")
        right = kind.lower() == b"bearer" and sent.decode("latin-1").strip() == secret
        sent_with = {b"authorization": header, b"host": b"x"}
        refused = raised_by(lambda: Access(known).check("GET", "/v1/label-sets", sent_with))  # noqa: B023
        assert (refused is None) == right, header
        assert refused is None or (isinstance(refused, KeyRefused) and secret not in refused.message)
        found["refused" if refused else "let in"] += 1
    Keys(store).revoke("trainer")
    return found


def fuzz_job_files(store: Path, draw: random.Random, count: int) -> Counter[str]:
    """Change a job's files so often: none of them raises, and no other job is touched."""
    jobs, found = store / FOLDER, Counter[str]()
    jobs.mkdir(exist_ok=True)
    now = datetime.now(UTC)
    job, other = JobFolder(jobs, REQUEST.job_id), JobFolder(jobs, "0" * 16)
    running = Job.of(REQUEST, now).running(ProcessId(pid=2, began="1/2"), "cpu", 3)
    job.write(running)
    other.write(Job.of(REQUEST, now).model_copy(update={"id": other.path.name}))
    write_json(job.path / OUTCOME, {"error": {"code": "server-fault", "message": "it fell"}})
    inbox = Inbox(jobs)
    inbox.leave(Wish.to_have(REQUEST, again=True, known=running))
    ((name, _),) = inbox.wishes()
    for _ in range(count):
        path = draw.choice([job.path / JOB, job.path / OUTCOME, jobs / "inbox" / name])
        sound = path.read_bytes()
        path.write_bytes(changed(draw, sound))
        known = {each.id: each for each in read_jobs(jobs)}
        assert other.path.name in known
        job.outcome()
        for _, wish in inbox.wishes():
            wish.applied(known.get(wish.id))
        found[path.name if path.parent == job.path else "wish"] += 1
        path.write_bytes(sound)
    return found


def fuzz(store: Path, seed: int, count: int) -> str:
    """Each of the three so often; what came of them."""
    draw, told = random.Random(seed), []
    for what in (fuzz_key_files, fuzz_presented_keys, fuzz_job_files):
        began = time.thread_time()
        found = what(store, draw, count)
        took_ms = 1000 * (time.thread_time() - began) / count
        told.append(f"{what.__name__}: {dict(found)}, {took_ms:.2f} ms each")
    return "; ".join(told)


def test_changed_keys_and_jobs_open_and_break_nothing(store: Path) -> None:
    print(f"\n{CHANGED} each (seed {SEED}): {fuzz(store, SEED, CHANGED)}")


@pytest.mark.proof
@pytest.mark.timeout(3600)
def test_many_changed_keys_and_jobs_open_and_break_nothing(store: Path) -> None:
    told = said_apart(
        "from pathlib import Path; from tests.attacks.test_keys_and_jobs import SEED, fuzz; "
        f"print(fuzz(Path({str(store)!r}), SEED + 1, 50_000))"
    )
    print(f"\n50,000 each (seed {SEED + 1}): {told}")
