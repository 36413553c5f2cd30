"""Paths of a label set's files; what lies in them is told in `layout`. Opens none of them."""

from dataclasses import dataclass
from pathlib import Path

from logitcache.storage.layout import TEXTS, Layout


@dataclass(frozen=True)
class Places:
    """Paths of one label set."""

    root: Path

    @property
    def group(self) -> Path:
        """The group's metadata: when it exists, the label set does."""
        return self.root / "zarr.json"

    @property
    def commits(self) -> Path:
        """Folder of the commits."""
        return self.root / "commits"

    @property
    def generations(self) -> Path:
        """Folder of the generations."""
        return self.root / "generations"

    @property
    def statistics(self) -> Path:
        """Folder of what was measured while labelling."""
        return self.root / "statistics"

    @property
    def staging(self) -> Path:
        """Folder of files that are not published yet."""
        return self.root / "staging"

    @property
    def quarantine(self) -> Path:
        """Folder of what was withdrawn."""
        return self.root / "quarantine"

    @property
    def stamps(self) -> Path:
        """What was verified on this machine."""
        return self.root / "stamps.json"

    @property
    def served(self) -> Path:
        """What servers answered, and what that took."""
        return self.root / "served.json"

    @property
    def lock(self) -> Path:
        """The file whose lock makes its holder the writer."""
        return self.root / "lock"

    @property
    def recording(self) -> Path:
        """What a recording was begun with: while it exists, the label set is being recorded."""
        return self.root / "recording" / "recording.json"

    @property
    def recording_ids(self) -> Path:
        """The ids of the examples that are recorded, where they are not their ordinals."""
        return self.recording.with_name("ids")

    @property
    def recording_log(self) -> Path:
        """The log of what was recorded."""
        return self.recording.with_name("log")

    def part(self, layout: Layout, name: str, shard: int) -> Path:
        """One of the files that a shard's commit covers; see `Layout.parts`."""
        if name == TEXTS:
            return self.root / TEXTS / f"{shard}.json"
        return self.root / name / layout.arrays[name].chunk_key(shard)

    def commit(self, shard: int) -> Path:
        """A shard's commit."""
        return self.commits / f"{shard}.json"
