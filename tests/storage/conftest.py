"""A reference of three shards, and label sets made from it."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.building import Reference, build, reference
from tests.storage.machines import DONE


@pytest.fixture(scope="session")
def source() -> Reference:
    """The dense logits that the label sets were made from; the last shard is not full."""
    return reference(3)


@pytest.fixture(scope="session")
def sound(source: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete label set. Only to be read."""
    return build(tmp_path_factory.mktemp("store") / "sound", source)


@pytest.fixture
def label_set(sound: Path, tmp_path: Path) -> Path:
    """A copy of it for a test that changes it."""
    return Path(shutil.copytree(sound, tmp_path / "store" / "set"))


@pytest.fixture(scope="module")
def without_waiting_for_the_disk() -> Iterator[None]:
    """The kernel is not killed here, so nothing is lost; what was done is told."""
    with pytest.MonkeyPatch.context() as patched:
        for name in ("fsync", "fdatasync"):
            patched.setattr(os, name, lambda handle: None)
        yield
    print("\n", ", ".join(f"{count:,} {what}" for what, count in sorted(DONE.items())))
    DONE.clear()
