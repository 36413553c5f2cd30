"""Hostile folders are refused, or what is sound of them is served; nothing hangs, no link is followed.

All attacks of `tests.attacks.folders` are tried one after the other in one process of bounded memory, so that what one
of them does to it is seen.
"""

import dataclasses
import multiprocessing
import shutil
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from click.testing import CliRunner
from tests.attacks.folders import ATTACKS, BASES, SECRET, Attack, linked_folder, make_base
from tests.attacks.trial import BOOKS, all_attacks
from tests.building import Reference, writer_of
from tests.conformance import assert_rows_equal
from tests.runs import RANK_0, small_run

from logitcache.client import HttpLabelSet
from logitcache.labels.errors import InvalidRequest, LabelSetLocked, RowsMissing, StorageFault
from logitcache.labels.label_set import LABELLED, UNKNOWN, UNLABELLED
from logitcache.labels.recorded import MAX_PLACES
from logitcache.server.cli import cli
from logitcache.server.http.app import create_app
from logitcache.server.http.catalog import Catalog
from logitcache.server.http.serve import running
from logitcache.storage import (
    LocalLabelSet,
    RecordedLabelSet,
    Recording,
    label_set_names,
    open_label_set,
    shards,
)
from logitcache.storage.lock import WriterLock

MORE_MEMORY = 300 << 20
"""Bytes of memory that it may take at most beyond what it has before the first attack."""

EVERY = 4
"""The default suite tries every fourth attack, `make proof` all."""

SECONDS = 20.0
"""That one attack may take: several times what the slowest does, on a machine that others use, too."""


def outcomes(attacks: list[Attack], folder: Path) -> dict[str, tuple[Any, float]]:
    """By name of an attack what came of it, and its seconds; and the ``memory`` of all of them."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=all_attacks, args=([each.name for each in attacks], folder, send))
    process.start()
    send.close()
    found: dict[str, tuple[Any, float]] = {}
    with suppress(EOFError):
        while receive.poll(3 * SECONDS):
            name, *rest = receive.recv()
            found[name] = (rest[0], rest[1])
    process.kill()
    process.join()
    return found


def check(attacks: list[Attack], folder: Path) -> None:
    found = outcomes(attacks, folder)
    told = {each.name: each.outcome for each in attacks}
    others = {name: found.get(name, ("it hung, or ended the process", 0.0))[0] for name in told}
    assert {name: what for name, what in others.items() if what != told[name]} == {}
    memory = found.pop("memory")[0]
    slowest = max(found, key=lambda name: found[name][1])
    counts = {outcome: [*told.values()].count(outcome) for outcome in sorted(set(told.values()))}
    print(f"{len(told)} hostile folders, {counts}; {memory >> 20} MiB more, {found[slowest][1]:.1f} s for {slowest!r}")
    assert memory < MORE_MEMORY
    assert found[slowest][1] < SECONDS


def test_a_hostile_folder_is_refused_or_what_is_sound_of_it_is_served_in_bounded_memory(tmp_path: Path) -> None:
    check(ATTACKS[::EVERY], tmp_path)


@pytest.mark.proof
def test_every_hostile_folder_is_refused_or_what_is_sound_of_it_is_served_in_bounded_memory(tmp_path: Path) -> None:
    check(ATTACKS, tmp_path)


LINKS = [each for each in ATTACKS if " link" in each.name and each.outcome == "refused"]


@pytest.mark.parametrize("each", LINKS[::5], ids=lambda each: each.name)
def test_a_symbolic_link_is_named_and_what_to_do_about_it(each: Attack, tmp_path: Path) -> None:
    path = make_base(each.base, tmp_path / "store" / "set")
    each.make(path)
    with pytest.raises(StorageFault, match="is a symbolic link, which is not followed"):
        open_label_set(path)


def test_the_store_itself_may_be_a_symbolic_link(tmp_path: Path) -> None:
    make_base("points", tmp_path / "disk" / "set")
    (tmp_path / "store").symlink_to(tmp_path / "disk")
    with closing(open_label_set(tmp_path / "store" / "set")) as reader:
        assert len(reader.fetch([0])) == 1


@pytest.mark.parametrize("name", ["staging", "texts", "recording", "commits", "generations", "statistics"])
def test_a_writer_removes_nothing_behind_a_linked_folder(tmp_path: Path, name: str) -> None:
    path = make_base("books", tmp_path / "store" / "set")
    linked_folder(path / name)
    for opens in (lambda: writer_of(path, BOOKS), lambda: WriterLock(path / "lock")):
        with pytest.raises(StorageFault, match="symbolic link"):
            opens()
    assert [file.read_bytes() for file in tmp_path.glob("outside-*/*/secret")] == [SECRET]


def test_a_lock_is_never_written_through_another_name_of_it(tmp_path: Path) -> None:
    path = make_base("points", tmp_path / "store" / "set")
    (path / "lock").unlink()
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET)
    (path / "lock").hardlink_to(secret)
    with WriterLock(path / "lock"), pytest.raises(LabelSetLocked):
        WriterLock(path / "lock")
    assert secret.read_bytes() == SECRET


def test_links_that_appear_while_it_is_open_are_not_followed_and_what_is_behind_them_is_not_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards.Shards, "_start_verifier", lambda self: None)
    path = make_base("points", tmp_path / "store" / "set")
    with closing(LocalLabelSet(path)) as reader:
        linked_folder(path / "logits")
        with pytest.raises(RowsMissing, match="damaged"):
            reader.fetch([0])
    moved = tmp_path / "outside-store-set" / "logits"
    assert {"c.0.0", "c.1.0", "c.2.0", "secret"} <= {file.name for file in moved.iterdir()}


def test_hostile_label_sets_do_not_stop_the_others_of_their_store(
    tmp_path: Path, sound: Path, source: Reference
) -> None:
    store = tmp_path / "store"
    shutil.copytree(sound, store / "sound")
    bases = {base: make_base(base, tmp_path / "bases" / base) for base in BASES}
    for number, each in enumerate(ATTACKS[::20]):
        each.make(Path(shutil.copytree(bases[each.base], store / f"hostile-{number}")))
    known = label_set_names(store)
    assert "sound" in known
    with running(create_app(Catalog(store))) as url, httpx.Client(base_url=url, timeout=60) as client:
        listed = client.get("/v1/label-sets")
        assert listed.status_code == 200
        assert "sound" in [each["name"] for each in listed.json()]
        with closing(HttpLabelSet(url, "sound")) as reader:
            assert_rows_equal(reader.fetch([3, 8000]), source, np.array([3, 8000]))
        for name in known:
            answer = client.get(f"/v1/label-sets/{name}")
            assert answer.status_code == 200 or answer.json()["code"] != "server-fault", (name, answer.text)
        assert client.get("/metrics").status_code == 200
    listing = CliRunner().invoke(cli, ["ls", "--store", str(store)])
    assert (listing.exit_code, isinstance(listing.exception, SystemExit)) == (1, True)
    assert any(line.startswith("sound ") for line in listing.output.splitlines())


def test_a_recording_of_two_thousand_million_places_takes_memory_for_what_is_recorded(tmp_path: Path) -> None:
    plain = small_run(6)
    terms = dataclasses.replace(plain.terms, examples=MAX_PLACES)
    before = held_bytes()
    with Recording(tmp_path / "store" / "run", terms) as recording:
        recording.begin(RANK_0)
        recording.append(plain.batch([0, 5]), RANK_0)
        recording.finish(RANK_0)
        stand = recording.stand()
        assert (stand.examples, stand.recorded, len(stand.missing), stand.missing[:4]) == (
            MAX_PLACES,
            2,
            1000,
            (1, 2, 3, 4),
        )
        with closing(RecordedLabelSet(tmp_path / "store" / "run")) as reader:
            assert len(reader.fetch([0, 5])) == 2
            assert reader.states([0, 1, MAX_PLACES - 1, MAX_PLACES]).tolist() == [
                LABELLED,
                UNLABELLED,
                UNLABELLED,
                UNKNOWN,
            ]
            assert reader.describe().labelled == 2
    assert held_bytes() - before < 64 << 20


def held_bytes() -> int:
    """Anonymous memory of this process."""
    with Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon:")) << 10


def test_rows_too_wide_for_a_log_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    plain = small_run(6)
    identity = dataclasses.replace(plain.identity, k=2**31 - 1, classes=2**31 - 1)
    with pytest.raises(InvalidRequest, match="store fewer classes"):
        Recording(tmp_path / "run", dataclasses.replace(plain.terms, identity=identity))
    assert not (tmp_path / "run").exists()
