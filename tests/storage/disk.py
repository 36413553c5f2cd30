"""A disk with a volatile cache, for asking what a power cut leaves: only what was synced is sure to be there.

The model is POSIX taken at its word, and no file system in particular:

- A file's bytes are sure after `fsync` of the file. Before, each sector that changed is there or not, and so is the
  file's length.
- A name (a link, a rename's, a removal, a folder's) is sure after `fsync` of the folder that holds it. Before, each
  is there or not, whatever the others; a synced file in a folder whose own name was not synced can be gone with it.
- A rename never loses the file: its old name is not gone before the new one stands. In one folder it is one step.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.storage.faults import Killed

from logitcache.storage.files import Bytes, Files

SECTOR = 512
"""Bytes that a disk writes whole or not at all."""

Tree = dict[str, bytes | None]
"""What stands in a folder: files with their bytes, folders as None, by paths relative to it."""


@dataclass(eq=False)
class File:
    """Bytes that are sure, and those that a reader sees now."""

    sure: bytes = b""
    now: bytes = b""


@dataclass(eq=False)
class Folder:
    """Names that are sure, and those that a reader sees now, which are the sure ones with what is ``pending``."""

    sure: dict[str, "File | Folder"] = field(default_factory=dict)
    now: dict[str, "File | Folder"] = field(default_factory=dict)
    pending: list["Change"] = field(default_factory=list)

    def sync(self) -> None:
        """All names are sure now."""
        pending, self.pending, self.sure = self.pending, [], dict(self.now)
        for change in pending:
            change.is_sure = True
            if change.after is not None and not change.after.is_sure:
                change.after.settle()


@dataclass(eq=False)
class Change:
    """Names of one folder that change at once: to what they belong then, None if they are gone.

    ``after`` is a change in another folder without which this one does not last.
    """

    folder: Folder
    names: dict[str, File | Folder | None]
    after: "Change | None" = None
    is_sure: bool = False

    def settle(self) -> None:
        """It lasts, whatever becomes of the others of its folder."""
        self.is_sure = True
        self.folder.pending.remove(self)
        apply(self.names, self.folder.sure)


def apply(names: dict[str, File | Folder | None], to: dict[str, File | Folder]) -> None:
    """Change these names."""
    for name, node in names.items():
        if node is None:
            to.pop(name, None)
        else:
            to[name] = node


Lasts = Callable[[Change], bool]

Content = Callable[[File], bytes]

Forgets = Callable[[str, Path], bool]
"""Syncs that do nothing, by operation and path: as if the code did not make them."""


class Disk(Files):
    """A file layer on a real folder ``root`` that knows what of it a power cut would leave.

    What is changed past this layer (a lock file, a folder that is removed) is noticed, and not sure.

    Attributes:
        moment: called before the first operation, after each, and within those that write and sync at once.
        dies_at: the number of the operation before which the process is killed; the disk goes on.
        dies_within: of one that writes and syncs at once: between the two, so that the next process finds it unsynced.
    """

    def __init__(self, root: Path, moment: Callable[[], None], forgets: Forgets = lambda *_: False) -> None:
        self.root, self.moment, self.forgets = root, moment, forgets
        self.number, self.dies_at, self.dies_within, self.syncs = 0, -1, -1, list[tuple[str, Path]]()
        self.tree = self._load(root)

    def _load(self, folder: Path) -> Folder:
        names: dict[str, File | Folder] = {}
        for path in folder.iterdir():
            if path.is_dir():
                names[path.name] = self._load(path)
            else:
                content = path.read_bytes()
                names[path.name] = File(content, content)
        return Folder(dict(names), dict(names))

    def write(self, path: Path, data: Bytes, size: int | None = None) -> None:
        self._step(partial(super().write, path, data, size))

    def fsync(self, path: Path) -> None:
        self._step(partial(super().fsync, path), partial(self._synced, "fsync", path))

    def link(self, staged: Path, final: Path) -> None:
        self._step(partial(super().link, staged, final), partial(self._linked, staged, final))

    def rename(self, old: Path, new: Path) -> None:
        self._step(partial(super().rename, old, new), partial(self._renamed, old, new))

    def remove(self, path: Path) -> None:
        self._step(partial(super().remove, path))

    def make_folder(self, path: Path) -> None:
        self._step(partial(super().make_folder, path))

    def append(self, handle: int, path: Path, end: int, data: Bytes) -> None:
        self._step(partial(super().append, handle, path, end, data), partial(self._written, "append", path))

    def erase(self, handle: int, path: Path, at: int, size: int) -> None:
        self._step(partial(super().erase, handle, path, at, size), partial(self._written, "erase", path))

    def cut(self, handle: int, path: Path, end: int) -> None:
        self._step(partial(super().cut, handle, path, end), partial(self._written, "cut", path))

    def _step(self, act: Callable[[], None], effect: Callable[[], None] = lambda: None) -> None:
        if 0 <= self.dies_at <= self.number:
            raise Killed
        self._notice(self.tree, self.root)
        if self.number == 0:
            self.moment()
        self.number += 1
        act()
        effect()
        self._notice(self.tree, self.root)
        self.moment()

    def _synced(self, operation: str, path: Path) -> None:
        self.syncs.append((operation, path))
        if not self.forgets(operation, path):
            node = self._node(path)
            if isinstance(node, Folder):
                node.sync()
            else:
                node.sure = node.now

    def _linked(self, staged: Path, final: Path) -> None:
        self._change(final.parent, {final.name: self._node(staged)})

    def _renamed(self, old: Path, new: Path) -> None:
        node = self._node(old)
        if old.parent == new.parent:
            self._change(old.parent, {old.name: None, new.name: node})
        else:
            arrival = self._change(new.parent, {new.name: node})
            self._change(old.parent, {old.name: None}, arrival)

    def _written(self, operation: str, path: Path) -> None:
        file = self._node(path)
        assert isinstance(file, File)
        file.now = path.read_bytes()
        self.moment()
        if self.dies_within == self.number - 1:
            self.dies_at = self.number
            raise Killed
        self._synced(operation, path)

    def _node(self, path: Path) -> File | Folder:
        node: File | Folder = self.tree
        for name in path.relative_to(self.root).parts:
            assert isinstance(node, Folder)
            node = node.now[name]
        return node

    def _change(self, folder: Path, names: dict[str, File | Folder | None], after: Change | None = None) -> Change:
        at = self._node(folder)
        assert isinstance(at, Folder)
        change = Change(at, names, after)
        at.pending.append(change)
        apply(names, at.now)
        return change

    def _notice(self, folder: Folder, path: Path) -> None:
        """Take in what is there and was not, and what is gone."""
        there = {each.name: each for each in path.iterdir()}
        for name, each in there.items():
            if name not in folder.now:
                self._change(path, {name: Folder() if each.is_dir() else File(b"", each.read_bytes())})
            node = folder.now[name]
            if isinstance(node, Folder):
                self._notice(node, each)
        for name in folder.now.keys() - there.keys():
            self._change(path, {name: None})

    def left(self, lasts: Lasts, content: Content) -> Tree:
        """What a power cut leaves if these changes of names last, and files have this content."""
        tree: Tree = {}
        chosen: dict[Change, bool] = {}
        contents: dict[File, bytes] = {}

        def stands(change: Change) -> bool:
            if change.is_sure:
                return True
            if change not in chosen:
                chosen[change] = lasts(change) and (change.after is None or stands(change.after))
            return chosen[change]

        def take(folder: Folder, prefix: str) -> None:
            names = dict(folder.sure)
            for change in folder.pending:
                if stands(change):
                    apply(change.names, names)
            for name, node in names.items():
                if isinstance(node, Folder):
                    tree[prefix + name] = None
                    take(node, f"{prefix}{name}/")
                else:
                    if node not in contents:
                        contents[node] = content(node)
                    tree[prefix + name] = contents[node]

        take(self.tree, "")
        return tree

    def after_a_cut(self, rng: random.Random, subsets: int) -> Iterator[Tree]:
        """What a power cut now may leave: nothing that is not sure; names without bytes, bytes without names, all of
        it; and so many random parts of it.
        """
        for all_names in (False, True):
            yield self.left(lambda _, lasts=all_names: lasts, lambda file: file.sure)  # type: ignore[misc]
            yield self.left(lambda _, lasts=all_names: lasts, lambda file: file.now)  # type: ignore[misc]
        for _ in range(subsets):
            share = rng.choice([0.2, 0.5, 0.8])
            yield self.left(lambda _, share=share: rng.random() < share, partial(torn, rng))  # type: ignore[misc]

    @property
    def now(self) -> Tree:
        """What a reader sees now: it must be what stands in the real folder."""
        self._notice(self.tree, self.root)
        return self.left(lambda _: True, lambda file: file.now)


def torn(rng: random.Random, file: File) -> bytes:
    """Some of the sectors that were not synced, and some length between the lengths before and after."""
    sure, now = file.sure, file.now
    if sure is now:
        return now
    shortest, longest = sorted((len(sure), len(now)))
    length = rng.choice([len(sure), len(now), rng.randint(shortest, longest)])
    sure, now = sure.ljust(longest, b"\0"), now.ljust(longest, b"\0")
    sectors = [rng.choice([sure, now])[at : at + SECTOR] for at in range(0, longest, SECTOR)]
    return b"".join(sectors)[:length]


def rebuilt(tree: Tree, root: Path) -> Path:
    """A folder in which this stands; ``root`` is new."""
    root.mkdir()
    for name, content in tree.items():
        if content is None:
            (root / name).mkdir()
            continue
        with (root / name).open("wb") as file:
            file.write(content.rstrip(b"\0"))
            file.truncate(len(content))
    return root


def same(tree: Tree) -> frozenset[tuple[str, int]]:
    """A key that equal trees have in common."""
    return frozenset((name, hash(content)) for name, content in tree.items())
