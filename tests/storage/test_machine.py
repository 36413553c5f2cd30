"""A store under arbitrary sequences of writing, failing, damaging, verifying and reading, against a model of it.

The model is the set of shards that are committed and sound. At every moment a reader that is open all along, and one
that is opened anew, serve exactly the rows of those shards, and each row is the reference's.
"""

import errno
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.building import commit_shards, reference, writer_of
from tests.storage.faults import failing

from logitcache.labels.errors import RowsMissing, StorageFault
from logitcache.storage import LocalLabelSet

SOURCE = reference(3, short_by=4000)
SHARDS = SOURCE.layout.shards
ARRAYS = sorted(SOURCE.layout.arrays)


class Store(RuleBasedStateMachine):
    """One label set and what should be true of it."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.path = self.root / "store" / "set"
        self.sound: set[int] = set()
        self.digest: str | None = None
        self.reader: LocalLabelSet | None = None

    @initialize()
    def begin(self) -> None:
        writer_of(self.path, SOURCE).close()
        self.reader = LocalLabelSet(self.path)

    def refreshed(self) -> LocalLabelSet:
        assert self.reader is not None
        self.reader._shards.refresh()
        return self.reader

    @rule(shard=st.integers(0, SHARDS - 1))
    def commit(self, shard: int) -> None:
        with writer_of(self.path, SOURCE) as writer:
            assert set(writer.committed) == self.sound
            if shard in writer.missing:
                commit_shards(writer, SOURCE, [shard])
        self.sound.add(shard)

    @rule(
        shard=st.integers(0, SHARDS - 1), operation=st.integers(0, 45), code=st.sampled_from([errno.EIO, errno.ENOSPC])
    )
    def commit_with_a_failing_disk(self, shard: int, operation: int, code: int) -> None:
        try:
            with writer_of(self.path, SOURCE, files=failing(operation, code)) as writer:
                if shard in writer.missing:
                    commit_shards(writer, SOURCE, [shard])
        except StorageFault:
            # All of it or nothing: the commit decides.
            if (self.path / "commits" / f"{shard}.json").exists():
                self.sound.add(shard)
        else:
            self.sound.add(shard)

    @precondition(lambda self: len(self.sound) == SHARDS)
    @rule()
    def seal(self) -> None:
        with writer_of(self.path, SOURCE) as writer:
            generation = writer.seal()
        assert generation.digest == (self.digest or generation.digest), "a repair changed the content"
        assert generation.number == 1
        self.digest = generation.digest

    @precondition(lambda self: self.sound)
    @rule(data=st.data(), name=st.sampled_from(ARRAYS), found_by=st.sampled_from(["verify", "open", "writer"]))
    def damage(self, data: st.DataObject, name: str, found_by: str) -> None:
        shard = data.draw(st.sampled_from(sorted(self.sound)))
        array = SOURCE.layout.arrays[name]
        chunk = self.path / name / array.chunk_key(shard)
        content = bytearray(chunk.read_bytes())
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= 1 << data.draw(st.integers(0, 7))
        # Written aside and renamed: a file under a mapping is never changed in place.
        aside = chunk.with_name("aside")
        aside.write_bytes(content)
        aside.rename(chunk)
        self.sound.remove(shard)
        reader = self.refreshed()
        if found_by == "verify":
            reports = reader.verify_all()
            assert shard in [report.shard for report in reports if not report.ok]
        elif found_by == "open":
            fresh = LocalLabelSet(self.path)
            with pytest.raises(RowsMissing):
                fetch(fresh, shard)
            fresh.close()
        else:
            with writer_of(self.path, SOURCE) as writer:
                assert shard in writer.quarantined

    @invariant()
    def exactly_the_sound_shards_are_served(self) -> None:
        if self.reader is None:
            return
        fresh = LocalLabelSet(self.path)
        for reader in (self.refreshed(), fresh):
            for shard in range(SHARDS):
                if shard in self.sound:
                    ids, indices = fetch(reader, shard)
                    assert np.array_equal(indices, SOURCE.order[ids])
                else:
                    with pytest.raises(RowsMissing):
                        fetch(reader, shard)
            description = reader.describe()
            assert (description.digest, description.shards.committed) == (self.digest, len(self.sound))
        fresh.close()

    def teardown(self) -> None:
        if self.reader is not None:
            self.reader.close()
        shutil.rmtree(self.root)


def fetch(reader: LocalLabelSet, shard: int) -> tuple[np.ndarray, np.ndarray]:
    span = SOURCE.layout.span(shard)
    ids = np.array([span.start, span.stop - 1, (span.start + span.stop) // 2])
    return ids, reader.fetch(ids).indices


TestStore = Store.TestCase
TestStore.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)
