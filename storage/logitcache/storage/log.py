"""A log of rows: frames that are appended whole and durably, and rows that are read from it wherever they lie.

The file is an array of slots of equal size. A frame is one slot that says what follows, and a slot a row:

    header   magic, number of rows, checksum, kind, rank, sitting; the rest of the slot zero
    row      place, step, fingerprint, position; the fields of the row

The checksum is XXH3-64, seeded with the log's own number plus the header's slot number, over the header (its own field
zero) and the rows: a frame counts whole or not at all, at its own place alone, and in its own log. Frames are written
one after the other, each durable before the next is begun, so that a crash tears the last one at most; that was not
acknowledged. Knows no ids, and not what a frame means.
"""

import mmap
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np
import xxhash
from jaxtyping import Int64, UInt8

from logitcache.labels.errors import InvalidRequest, ShardDamaged, StorageFault, TooManyRows, Unavailable
from logitcache.labels.soft_labels import RowSpec
from logitcache.storage.files import Files, explained
from logitcache.storage.reading import LARGE_BYTES, open_file

MAGIC = b"LCLOG\x00\x01\n"

HEADER = np.dtype(
    [("magic", "S8"), ("rows", "<u8"), ("checksum", "<u8"), ("kind", "<u4"), ("rank", "<u4"), ("sitting", "<u8")]
)

MOST_FRAME_ROWS = 1 << 24
MOST_FRAME_BYTES = 1 << 30
"""A header that tells more rows, or rows of more bytes, is none of ours."""

MOST_ROW_BYTES = 8 << 20
"""Wider rows are not recorded: each frame begins with a slot as long as a row. A million classes fit."""

_SCANNED_BYTES = 1 << 20
"""Bytes behind the last whole frame that are looked through at once."""


class Kind(IntEnum):
    """What a frame is."""

    ROWS = 1
    BEGAN = 2
    FINISHED = 3
    SEALING = 4
    SEALING_PART = 5


@dataclass(frozen=True)
class Frame:
    """One whole frame: its rows stand in slots from ``first`` on."""

    kind: Kind
    rank: int
    sitting: int
    first: int
    rows: int


def check_width(spec: RowSpec) -> None:
    """Refuse rows that are too wide for a frame.

    Raises:
        InvalidRequest: they are.
    """
    if spec.row_bytes > MOST_ROW_BYTES:
        raise InvalidRequest(
            f"a row of k={spec.k:,} has {spec.row_bytes:,} bytes, {MOST_ROW_BYTES:,} are recorded: store fewer classes"
        )


def slot_dtype(spec: RowSpec) -> np.dtype:
    """What a row takes in the log, for rows of this kind, which `check_width` lets pass: whole 8-byte words, and no
    less than a header.
    """
    fields: list[tuple[str, str] | tuple[str, str, tuple[int, ...]]] = [
        ("place", "<i8"),
        ("step", "<i8"),
        ("fingerprint", "<u8"),
        ("position", "<u4"),
        ("scalars", "<f4", (len(spec.columns),)),
        *([("tokens", "<u4")] if spec.ragged else []),
        *([("target", "<i4")] if spec.targets else []),
        ("indices", np.dtype(spec.index_dtype).newbyteorder("<").str, (spec.k,)),
        ("logits", np.dtype(spec.dtype).newbyteorder("<").str, (spec.k,)),
    ]
    packed = np.dtype(fields)
    size = -(-max(packed.itemsize, HEADER.itemsize) // 8) * 8
    names = packed.names or ()
    return np.dtype(
        {
            "names": list(names),
            "formats": [packed[name] for name in names],
            "offsets": [packed.fields[name][1] for name in names] if packed.fields else [],
            "itemsize": size,
        }
    )


class Log:
    """A log that is read: by its writer, or while another process appends. One thread at a time follows it.

    ``number`` is the log's own, drawn when its recording was begun: frames of another log are none of it.

    Attributes:
        end: slots of the frames that were read; what follows is not there yet, or torn.

    Raises:
        StorageFault: it is not there, no regular file, or cannot be opened.
    """

    def __init__(self, path: Path, dtype: np.dtype, number: int) -> None:
        self.path, self.dtype, self.number = path, dtype, number
        self._mapping = threading.Lock()
        try:
            self._handle = open_file(path.parent.parent, path)
        except FileNotFoundError:
            raise StorageFault(f"{path} is missing: restore it", path=str(path)) from None
        self.rewind()

    @property
    def most_rows(self) -> int:
        """Rows that a frame may have."""
        return min(MOST_FRAME_ROWS, MOST_FRAME_BYTES // self.dtype.itemsize - 1)

    def rewind(self) -> None:
        """Read it from its beginning again."""
        self.end, self._last = 0, 0
        self._last_header = b""
        self._mapped: UInt8[np.ndarray, "slots bytes"] = np.zeros((0, self.dtype.itemsize), np.uint8)

    @property
    def is_cut(self) -> bool:
        """The last frame that was read is not there any more: it could not be made durable, and was cut off."""
        if not self._last_header:
            return False
        return self._header(self._last) != self._last_header

    def follow(self) -> Iterator[tuple[Frame, np.ndarray]]:
        """The frames that were appended since the last call, and their rows, (rows,) of the slots' dtype; ends at the
        first that is not whole.
        """
        while (found := self._frame(self.end)) is not None:
            self.end = found[0].first + found[0].rows
            yield found

    def _frame(self, at: int) -> tuple[Frame, np.ndarray] | None:
        """The frame whose header is in this slot, if it is whole. Read and not mapped: a torn one may be cut off."""
        content = self._header(at)
        if content is None:
            return None
        header = np.frombuffer(content, HEADER)[0]
        count, kind = int(header["rows"]), int(header["kind"])
        if bytes(header["magic"]) != MAGIC or count > self.most_rows or kind not in set(Kind):
            return None
        if (1 + count) * self.dtype.itemsize > LARGE_BYTES and not self._is_whole(at, count):
            return None  # before there is memory for it: most of it may be a hole
        frame = self._read(at, 1 + count)
        if frame is None or int(header["checksum"]) != _checksum(frame, self.number + at):
            return None
        rows = frame[1:].reshape(-1).view(self.dtype)
        self._last, self._last_header = at, content
        return Frame(Kind(kind), int(header["rank"]), int(header["sitting"]), at + 1, count), rows

    def _is_whole(self, at: int, count: int) -> bool:
        """The frame of so many rows whose header is in this slot hashes right, read piece by piece."""
        several = max(1, _SCANNED_BYTES // self.dtype.itemsize)
        head = self._read(at, 1)
        if head is None or self._read(at + count, 1) is None:
            return False
        state = _begun_checksum(head[0], self.number + at)
        for first in range(at + 1, at + 1 + count, several):
            rows = self._read(first, min(several, at + 1 + count - first))
            if rows is None:
                return False
            state.update(rows.data)
        return int(head[0, : HEADER.itemsize].view(HEADER)[0]["checksum"]) == state.intdigest()

    def _header(self, at: int) -> bytes | None:
        """What begins a slot, if it is there."""
        with explained(self.path):
            content = os.pread(self._handle, HEADER.itemsize, at * self.dtype.itemsize)
        return content if len(content) == HEADER.itemsize else None

    def _read(self, at: int, slots: int) -> UInt8[np.ndarray, "slots bytes"] | None:
        """So many slots from one on, None if the file has fewer."""
        size, offset = slots * self.dtype.itemsize, at * self.dtype.itemsize
        if offset + size > os.fstat(self._handle).st_size:
            return None
        data, done = np.empty(size, np.uint8), 0
        with explained(self.path):
            while done < size:
                read = os.preadv(self._handle, [data[done:].data], offset + done)
                if not read:
                    return None
                done += read
        return data.reshape(slots, -1)

    def refuse_damaged(self) -> None:
        """Refuse a log in which more than a torn frame follows the last whole one.

        Raises:
            ShardDamaged: another frame begins behind it, or it is more than a torn frame can be, so it was changed and
                not torn, or is the log of another recording: what was acknowledged is lost. No row begins as a frame
                does: its place is a small number.
        """
        rest = os.fstat(self._handle).st_size - self.end * self.dtype.itemsize
        # The first frame of a log has no rows, and what follows it is written when it is durable.
        most = MOST_FRAME_BYTES if self.end else self.dtype.itemsize
        if rest > most or self._begins_behind():
            raise ShardDamaged(
                f"{self.path} is damaged at byte {self.end * self.dtype.itemsize:,}: rows that were recorded there "
                "are lost, and others follow; restore it, or record under another name"
            )

    def _begins_behind(self) -> bool:
        """A slot behind the first torn one begins as a frame does."""
        several = max(1, _SCANNED_BYTES // self.dtype.itemsize)
        slots = os.fstat(self._handle).st_size // self.dtype.itemsize
        for at in range(self.end + 1, slots, several):
            read = self._read(at, min(several, slots - at))
            if read is not None:
                begun = (read[:, : len(MAGIC)] == np.frombuffer(MAGIC, np.uint8)).all(axis=1)
                if begun.any():
                    return True
        return False

    def rows(self, slots: Int64[np.ndarray, " rows"]) -> np.ndarray:
        """Rows in these slots, which belong to frames that were read: a copy, (rows,) of the slots' dtype."""
        mapping = self._mapped
        if len(mapping) < self.end:
            with self._mapping:
                if self._handle < 0:
                    raise Unavailable(f"{self.path} was closed while rows were read from it: ask again")
                # What was read once is not cut off. An older mapping goes with its last use.
                mapped = mmap.mmap(self._handle, self.end * self.dtype.itemsize, prot=mmap.PROT_READ)
                mapping = self._mapped = np.frombuffer(mapped, np.uint8).reshape(-1, self.dtype.itemsize)
        rows: np.ndarray = mapping.take(slots, axis=0).reshape(-1).view(self.dtype)
        return rows

    @property
    def is_removed(self) -> bool:
        """The file has no name any more: what stands under its name now is another one."""
        return self._handle >= 0 and os.fstat(self._handle).st_nlink == 0

    def close(self) -> None:
        """Close the file; rows that were read stay valid."""
        with self._mapping:
            if self._handle >= 0:
                os.close(self._handle)
                self._handle = -1


class LogWriter:
    """Appends frames to a log, which only its one writer changes; see `Log`.

    Attributes:
        is_broken: what could not be made durable could not be taken back either: nothing more can be appended.

    Raises:
        ShardDamaged: the log is damaged, and not torn at its end.
        DiskFull, StoreNotWritable, StorageFault: it cannot be opened for writing.
    """

    def __init__(self, log: Log, files: Files) -> None:
        """``log`` was followed to its end; what is torn behind it is cut off.

        All of it is synced: a process that was killed may have left a whole frame that was not.
        """
        self._log, self._files = log, files
        self._handle = files.open_to_append(log.path)
        self.is_broken = False
        try:
            log.refuse_damaged()
            files.cut(self._handle, log.path, log.end * log.dtype.itemsize)
        except BaseException:
            os.close(self._handle)
            raise

    def append(self, kind: Kind, rank: int, sitting: int, rows: np.ndarray | None = None) -> None:
        """Append a frame; when this returns it is durable.

        Raises:
            TooManyRows: more rows than a frame may have.
            DiskFull, StoreNotWritable, StorageFault: as they say; nothing of the frame is there then.
        """
        log, size = self._log, self._log.dtype.itemsize
        if self.is_broken:
            raise StorageFault(f"{log.path} could not be written before: begin to record again")
        if log.is_removed:
            raise StorageFault(f"{log.path} was removed while rows were recorded: begin to record again")
        count = 0 if rows is None else len(rows)
        if count > log.most_rows:
            raise TooManyRows(f"{count:,} rows in one batch, {log.most_rows:,} are recorded at once: split it")
        frame = np.zeros((1 + count, size), np.uint8)
        header = frame[0, : HEADER.itemsize].view(HEADER)
        header[0] = (MAGIC, count, 0, kind, rank, sitting)
        if rows is not None:
            frame[1:].view(log.dtype)[:, 0] = rows
        header["checksum"] = _checksum(frame, log.number + log.end)
        try:
            self._files.append(self._handle, log.path, log.end * size, frame.data)
        except BaseException:
            # What the disk holds now is unknown until it is taken back.
            self.is_broken = True
            self._take_back(log.end * size, len(frame) * size)
            self.is_broken = False
            raise

    def _take_back(self, at: int, size: int) -> None:
        """A frame that may not be durable is none; a whole one, which readers may have mapped, is not cut off."""
        if os.fstat(self._handle).st_size < at + size:
            self._files.cut(self._handle, self._log.path, at)
        else:
            self._files.erase(self._handle, self._log.path, at, HEADER.itemsize)

    def close(self) -> None:
        """Close the file."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def _checksum(frame: UInt8[np.ndarray, "slots bytes"], seed: int) -> int:
    """Checksum of a frame; its own field counts as zero."""
    state = _begun_checksum(frame[0], seed)
    state.update(frame[1:].reshape(-1).data)
    return int(state.intdigest())


def _begun_checksum(head: UInt8[np.ndarray, " bytes"], seed: int) -> xxhash.xxh3_64:
    header = head.copy()
    header[: HEADER.itemsize].view(HEADER)["checksum"] = 0
    return xxhash.xxh3_64(header.data, seed=seed % 2**64)
