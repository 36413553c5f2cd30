"""Label sets under arbitrary sequences of writing, growing, failing, being killed, damaged, found, repaired, sealed and
read, against a plain model of them, while other threads read all along.

The model of a label set is which rows each shard was committed with, which shards are sound, and what the generations
list. At every moment every reader serves exactly the rows of sound shards that the newest generation lists (before the
first one: that are committed); what a reader in another thread was given at any moment is right to the bit.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.building import Reference, grown, reference, statistics_of
from tests.storage.faults import Faulty, Killed
from tests.storage.machines import DONE, FAST, LONG, Reading, faults, retried

from logitcache.labels.errors import DatasetChanged, DigestChanged, InvalidRequest, StorageFault
from logitcache.labels.soft_labels import SoftLabels
from logitcache.storage import LocalLabelSet
from logitcache.storage.files import Files
from logitcache.storage.manifest import read_layout
from logitcache.storage.places import Places
from logitcache.storage.records import numbered
from logitcache.storage.writer import LabelSetWriter

pytestmark = pytest.mark.usefixtures("without_waiting_for_the_disk")

Versions = tuple[int, ...]

GROWTH: list[Reference] = [reference(2, k=2, classes=5, temperatures=(1.0,), ids="integer", short_by=4000)]
for more in (50, 5000):
    GROWTH.append(grown(GROWTH[-1], more))
"""A label set and what it grows to: two shards, three, five."""

WHOLE = GROWTH[-1]
SHARDS = WHOLE.layout.shards
PARTS = sorted(WHOLE.layout.parts)


def arrays_of(shard: int, version: int) -> dict[str, np.ndarray]:
    """A shard's rows; of version 1 the teacher gave other bits."""
    arrays = WHOLE.arrays(WHOLE.layout.span(shard))
    if version:
        arrays["logits"] = arrays["logits"].copy()
        arrays["logits"][:, -1] -= np.float16(0.25)
    return arrays


STORED = {(shard, version): arrays_of(shard, version) for shard in range(SHARDS) for version in (0, 1)}
"""By shard and version."""

CHOSEN = {shard: np.unique(np.linspace(0, len(WHOLE.layout.span(shard)) - 1, 7).astype(int)) for shard in range(SHARDS)}
"""Positions in each shard of the examples that are asked for."""


def asked_of(shard: int) -> np.ndarray:
    """Ordinals of the examples of a shard that are asked for."""
    return WHOLE.layout.span(shard).start + CHOSEN[shard]


class Store(RuleBasedStateMachine):
    """One label set and what should be true of it.

    Attributes:
        sound: version of each shard that is committed and sound.
        hurt: of those that were damaged since, and may have been found or not.
        sealed: versions of each generation's shards.
        listed: commits of each generation's shards.
        digests: of those versions.
        ever: all versions that each shard was ever committed with.
    """

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.path = self.root / "store" / "set"
        self.sound: dict[int, int] = {}
        self.hurt: dict[int, int] = {}
        self.sealed: list[Versions] = []
        self.listed: list[list[bytes]] = []
        self.digests: dict[Versions, str] = {}
        self.ever: set[tuple[int, int]] = set()
        self.size = 0
        self.seen: list[tuple[str | None, dict[int, int]]] = []
        self.reader: LocalLabelSet | None = None
        self.readings: list[Reading] = []

    # What is read.

    def versions_in(self, reader: LocalLabelSet) -> tuple[str | None, dict[int, int]]:
        """Digest of what a reader serves, and the version of each shard that it serves rows of: right to the bit."""
        soft = reader.fetch(WHOLE.at(np.concatenate([asked_of(shard) for shard in range(SHARDS)])), on_missing="mask")
        assert soft.present is not None
        found, first = {}, 0
        for shard in range(SHARDS):
            rows = slice(first, first + len(CHOSEN[shard]))
            first = rows.stop
            if soft.present[rows].any():
                found[shard] = self.version_of(shard, soft, rows)
        return soft.digest, found

    @staticmethod
    def version_of(shard: int, soft: SoftLabels, rows: slice) -> int:
        """Whose rows these are, all of one version and of these examples."""
        assert soft.present is not None
        assert soft.present[rows].all(), f"part of shard {shard} is served"
        for version in (0, 1):
            stored = {name: array[CHOSEN[shard]] for name, array in STORED[shard, version].items()}
            same = {
                "indices": np.array_equal(soft.indices[rows], stored["indices"]),
                "logits": np.array_equal(soft.logits[rows], stored["logits"]),
                "logit_max": np.array_equal(soft.logit_max[rows], stored["scalars"][:, 0]),
                "tail_logsumexp": np.array_equal(soft.tail_logsumexp[rows], stored["scalars"][:, 1:2]),
                "fingerprint": np.array_equal(soft.fingerprint[rows], stored["fingerprint"][:, 0]),
            }
            if all(same.values()):
                return version
        raise AssertionError(f"wrong rows of shard {shard}: {same}")

    def look(self, reader: LocalLabelSet) -> None:
        """What another thread reads is held against the model when the model knows what came of the rule."""
        self.seen.append(self.versions_in(reader))

    def refreshed(self) -> LocalLabelSet:
        assert self.reader is not None
        self.reader._shards.refresh()
        return self.reader

    def visible(self, versions: dict[int, int]) -> dict[int, int]:
        """Those that the newest generation lists, or all of them before the first one."""
        if not self.sealed:
            return versions
        listed = self.sealed[-1]
        return {shard: version for shard, version in versions.items() if listed[shard : shard + 1] == (version,)}

    # What is written.

    @property
    def layout_of(self) -> Reference:
        return GROWTH[self.size]

    def writer(self, files: Files | None = None) -> LabelSetWriter:
        """A writer that takes up what is there: of sound shards nothing is to be labelled again, of hurt ones all."""
        writer = retried(lambda: LabelSetWriter(self.path, self.layout_of.layout, files=files))
        assert isinstance(writer, LabelSetWriter)
        assert writer.committed == sorted(self.sound)
        self.hurt.clear()
        return writer

    def under(self, fault: tuple[str, int] | None, act: Callable[[Files], None]) -> bool:
        """Do something, under a fault of one operation or none; what stands afterwards tells how far it came. True if
        it was done.
        """
        if fault is None:
            act(Files())
            return True
        files = Faulty(fault[1], fault[0])
        try:
            act(files)
        except Killed:
            assert fault[0].startswith("killed")
        except StorageFault:
            assert not fault[0].startswith("killed")
        else:
            return True
        DONE[f"faults: {fault[0]}"] += 1
        return False

    def committed_now(self, shard: int, version: int) -> None:
        """After a fault: the commit decides."""
        if shard not in self.sound and shard not in self.hurt and Places(self.path).commit(shard).exists():
            self.sound[shard] = version

    FAULTY = faults(60)

    @initialize(fault=FAULTY)
    def create(self, fault: tuple[str, int] | None) -> None:
        self.under(fault, lambda files: self.writer(files).close())
        self.writer().close()
        self.reader = LocalLabelSet(self.path)
        other = LocalLabelSet(self.path)
        self.readings = [Reading(partial(self.look, reader)) for reader in (self.reader, other)]
        self.closing = other

    @rule(shard=st.integers(0, SHARDS - 1), version=st.sampled_from([0, 0, 1]), fault=FAULTY)
    def commit(self, shard: int, version: int, fault: tuple[str, int] | None) -> None:
        if shard < self.layout_of.layout.shards:
            self.label(shard, version, fault)

    def label(self, shard: int, version: int, fault: tuple[str, int] | None) -> None:
        """Commit one shard, if it is missing."""
        self.ever.add((shard, version))
        arrays = STORED[shard, version]

        def act(files: Files) -> None:
            with self.writer(files) as writer:
                if shard in writer.missing:
                    writer.commit(shard, arrays, statistics_of(arrays, WHOLE.identity))

        was = shard in self.sound
        if self.under(fault, act):
            self.sound.setdefault(shard, version)
            DONE["commits"] += not was
        else:
            self.committed_now(shard, version)

    @rule(version=st.sampled_from([0, 0, 1]))
    def commit_all(self, version: int) -> None:
        """As precompute does: whatever is missing."""
        for shard in range(self.layout_of.layout.shards):
            if shard not in self.sound:
                self.label(shard, version, None)

    @precondition(lambda self: self.sealed and len(self.sound) < len(self.sealed[-1]))
    @rule(shard=st.integers(0, SHARDS - 1))
    def commit_other_examples(self, shard: int) -> None:
        """A shard of a generation is never labelled again with other examples."""
        if shard in self.sound or shard in self.hurt or shard >= len(self.sealed[-1]):
            return
        folders = (self.path / "quarantine").glob(f"*-shard-{shard}")
        if not any(self.tells(folder, self.listed[-1][shard]) for folder in folders):
            return
        arrays = STORED[shard, 0] | {"fingerprint": STORED[shard, 0]["fingerprint"] ^ np.uint64(1)}
        with self.writer() as writer, pytest.raises(DatasetChanged):
            writer.commit(shard, arrays, statistics_of(arrays, WHOLE.identity))
        DONE["other examples refused"] += 1

    @staticmethod
    def tells(folder: Path, commit: bytes) -> bool:
        """Does what was set aside in a folder tell this commit: itself, or all of its files?"""
        kept = [path.read_bytes() for path in folder.iterdir()]
        hashes = {hashlib.sha256(content).hexdigest() for content in kept}
        return commit in kept or {part["sha256"] for part in json.loads(commit)["files"].values()} <= hashes

    @precondition(lambda self: len(self.sound) + len(self.hurt) == self.layout_of.layout.shards)
    @rule(fault=FAULTY)
    def seal(self, fault: tuple[str, int] | None) -> None:
        def act(files: Files) -> None:
            with self.writer(files) as writer:
                if writer.missing:
                    with pytest.raises(InvalidRequest):
                        writer.seal()
                else:
                    writer.seal()

        self.under(fault, act)
        versions = tuple(version for _, version in sorted(self.sound.items()))
        if len(numbered(Places(self.path).generations)) > len(self.sealed):
            assert len(versions) == self.layout_of.layout.shards
            self.sealed.append(versions)
            self.listed.append([Places(self.path).commit(shard).read_bytes() for shard in range(len(versions))])
            DONE["generations"] += 1

    @precondition(lambda self: self.size + 1 < len(GROWTH) and self.is_complete)
    @rule(fault=FAULTY)
    def grow(self, fault: tuple[str, int] | None) -> None:
        def act(files: Files) -> None:
            with self.writer(files) as writer:
                writer.grow(GROWTH[self.size + 1].layout)

        self.under(fault, act)
        if read_layout(self.path).examples > self.layout_of.layout.examples:
            self.size += 1
            DONE["growths"] += 1

    @property
    def is_complete(self) -> bool:
        """Sealed, with all that is sealed there."""
        versions = tuple(version for _, version in sorted(self.sound.items()))
        return bool(self.sealed) and versions == self.sealed[-1] and len(versions) == self.layout_of.layout.shards

    # What goes wrong.

    @precondition(lambda self: self.sound)
    @rule(
        data=st.data(),
        how=st.sampled_from(["flip", "truncate", "append", "empty", "delete", "foreign"]),
        what=st.sampled_from([*PARTS, "commits"]),
    )
    def damage(self, data: st.DataObject, how: str, what: str) -> None:
        """A file of a committed shard is exchanged for another: never changed in place, where a mapping may be."""
        shard = data.draw(st.sampled_from(sorted(self.sound)))
        places = Places(self.path)
        file = places.commit(shard) if what == "commits" else places.part(WHOLE.layout, what, shard)
        if what == "commits" and how == "delete":
            return  # as if it had never been committed; nothing is left to tell
        content = bytearray(file.read_bytes())
        if how == "flip":
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "truncate":
            del content[data.draw(st.integers(0, len(content) - 1)) :]
        elif how == "append":
            content += b"\0"
        elif how == "empty":
            content.clear()
        elif how == "foreign":
            others = [path for path in file.parent.iterdir() if path != file and path.name != "zarr.json"]
            if not others:
                return
            content = bytearray(data.draw(st.sampled_from(sorted(others))).read_bytes())
        if content == file.read_bytes() and how != "delete":
            return
        if how == "delete":
            file.unlink()
        else:
            aside = self.root / "aside"
            aside.write_bytes(content)
            aside.rename(file)
        self.hurt[shard] = self.sound.pop(shard)
        DONE[f"damages: {how}"] += 1

    # Who finds it.

    @rule()
    def verify(self) -> None:
        reports = {report.shard: report for report in self.refreshed().verify_all()}
        for shard in self.hurt:
            gone = not Places(self.path).commit(shard).exists()
            assert gone or not reports[shard].ok, f"damage of shard {shard} was not found"
        for shard in self.visible(self.sound):
            assert reports[shard].ok
        DONE["verifications"] += 1
        self.hurt.clear()

    @rule()
    def open_anew(self) -> None:
        """A reader that never saw a file of it hashes all that it serves."""
        with closing(LocalLabelSet(self.path)) as fresh:
            digest, found = self.versions_in(fresh)
            assert found == self.visible(self.sound)
            assert digest == (self.digests.get(self.sealed[-1]) if self.sealed else None)

    @rule()
    def write_nothing(self) -> None:
        """A writer looks at everything and sets damaged shards aside."""
        self.writer().close()

    @precondition(lambda self: self.sealed)
    @rule(data=st.data())
    def ask_for_an_older_generation(self, data: st.DataObject) -> None:
        """Of a digest only rows of that digest are served."""
        versions = data.draw(st.sampled_from(sorted(self.digests)))
        sound = self.visible(self.sound)
        wanted = {shard for shard, version in sound.items() if versions[shard : shard + 1] == (version,)}
        reader = self.refreshed()
        for shard in wanted:
            ids = WHOLE.at(asked_of(shard))
            soft = reader.fetch(ids, digest=self.digests[versions], on_missing="mask")
            assert soft.digest == self.digests[versions]
            assert self.version_of(shard, soft, slice(None)) == versions[shard]
        for shard in sound.keys() - wanted:
            if shard < len(versions):
                ids = WHOLE.at(asked_of(shard))
                with pytest.raises(DigestChanged):
                    reader.fetch(ids, digest=self.digests[versions], on_missing="mask")
        DONE["fetches of a generation"] += len(sound)

    @invariant()
    def what_is_sound_is_served_and_nothing_else(self) -> None:
        if self.reader is None:
            return
        reader = self.refreshed()
        digest, found = self.versions_in(reader)
        if self.sealed:
            known = self.digests.setdefault(self.sealed[-1], str(digest))
            assert known == digest, "the same content has another digest"
            assert len(set(self.digests.values())) == len(self.digests)
        else:
            assert digest is None
        sound, hurt = self.visible(self.sound), self.visible(self.hurt)
        assert sound.items() <= found.items() <= (sound | hurt).items()
        for reading in self.readings:
            reading.check()
        seen, self.seen = self.seen, []
        of_digest = {digest: versions for versions, digest in self.digests.items()}
        for then, versions in seen:
            for shard, version in versions.items():
                assert (shard, version) in self.ever
                # It may know a generation that a rule in between made: that has been listed by now.
                assert then is None or of_digest[then][shard] == version

    def teardown(self) -> None:
        for reading in self.readings:
            reading.close()
        if self.reader is not None:
            self.reader.close()
            self.closing.close()
        shutil.rmtree(self.root)


class LongStore(Store):
    """The same, for longer."""


TestStore = Store.TestCase
TestStore.settings = FAST
TestStoreForLonger = pytest.mark.proof(pytest.mark.timeout(7200)(LongStore.TestCase))
TestStoreForLonger.settings = LONG
