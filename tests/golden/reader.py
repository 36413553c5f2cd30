"""A reader of format 1, written from docs/format.md with NumPy and json alone: nothing of logitcache is imported."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Reader:
    """The newest generation of a label set, or the one of a digest; everything is checked when it is opened."""

    def __init__(self, folder: Path, digest: str | None = None) -> None:
        self.folder = folder
        manifest = json.loads((folder / "zarr.json").read_bytes())["attributes"]["logitcache"]
        if manifest["format_version"] != 1:
            raise ValueError("not of format 1")
        self.identity, self.shards = manifest["identity"], manifest["shards"]
        self.causal, self.texts = self.identity["alignment"] == "causal", self.identity["ids"] == "text"
        self.slots = {"example": manifest["examples_per_shard"], "row": manifest["rows_per_shard"]}
        generation = self._generation(digest)
        self.digest, self.temperatures = generation["digest"], self.identity["temperatures"]
        self.places: dict[int | str, tuple[int, int]] = {}  # by id: shard, and which example of it
        self.arrays = [self._shard(shard, commit) for shard, commit in enumerate(generation["commits"])]

    def _generation(self, digest: str | None) -> dict[str, Any]:
        for path in sorted((self.folder / "generations").glob("*.json"), key=lambda path: -int(path.stem)):
            try:
                generation: dict[str, Any] = json.loads(path.read_bytes())
                content = {"identity": self.identity, "commits": generation["commits"]}
                sound = generation["digest"] == "sha256:" + sha256(canonical(content))
            except (ValueError, KeyError, TypeError):
                continue  # damaged
            if sound and digest in (None, generation["digest"]):
                return generation
        raise ValueError(f"no generation {digest or 'is complete'}")

    def _columns(self) -> dict[str, tuple[str, str, int | None]]:
        """Slots, dtype and columns of each array."""
        identity = self.identity
        index = "<u2" if identity["classes"] <= 65_536 else "<u4"
        scalars = 1 + len(identity["temperatures"]) + identity["targets"]
        columns: dict[str, tuple[str, str, int | None]] = {
            "ids": ("example", "<u8", 2) if self.texts else ("example", "<i8", None),
            "fingerprint": ("example", "<u8", identity["views"]),
            "indices": ("row", index, identity["k"]),
            "logits": ("row", "<f2" if identity["dtype"] == "float16" else "<f4", identity["k"]),
            "scalars": ("row", "<f4", scalars),
        }
        if self.causal:
            columns |= dict.fromkeys(("row_start", "row_count"), ("example", "<u4", None))
            columns["tokens"] = ("row", "<u4", None)
        return columns | ({"target": ("row", "<i4", None)} if identity["targets"] else {})

    def _shard(self, shard: int, expected: str) -> dict[str, np.ndarray]:
        record = (self.folder / "commits" / f"{shard}.json").read_bytes()
        commit, arrays = json.loads(record), {}
        counts = {"example": self.shards["examples"][shard], "row": self.shards["rows"][shard]}
        if sha256(record) != expected or (commit["examples"], commit["rows"]) != tuple(counts.values()):
            raise ValueError(f"shard {shard} has another commit")
        for name, (per, dtype, columns) in self._columns().items():
            data = (self.folder / name / (f"c.{shard}" if columns is None else f"c.{shard}.0")).read_bytes()
            if commit["files"][name] != {"bytes": len(data), "sha256": sha256(data)}:
                raise ValueError(f"{name} of shard {shard} is damaged")
            rows = np.frombuffer(data, dtype).reshape((self.slots[per], *([] if columns is None else [columns])))
            arrays[name] = rows[: counts[per]]
        if self.causal and (arrays["row_start"].astype(int) + arrays["row_count"]).max() > counts["row"]:
            raise ValueError(f"rows of shard {shard} lie outside it")
        ids = arrays["ids"].tolist()
        if self.texts:
            data = (self.folder / "texts" / f"{shard}.json").read_bytes()
            if commit["files"]["texts"] != {"bytes": len(data), "sha256": sha256(data)}:
                raise ValueError(f"texts of shard {shard} are damaged")
            ids = json.loads(data)
        self.places |= {id: (shard, place) for place, id in enumerate(ids)}
        return arrays

    def fetch(self, id: int | str) -> dict[str, np.ndarray]:
        """The rows of one example; KeyError when there is none."""
        shard, place = self.places[id]
        arrays = self.arrays[shard]
        start, count = (arrays["row_start"][place], arrays["row_count"][place]) if self.causal else (place, 1)
        rows = {name: arrays[name][start : start + count] for name in ("indices", "logits", "scalars")}
        rows |= {name: arrays[name][start : start + count] for name in ("tokens", "target") if name in arrays}
        return rows | {"fingerprint": arrays["fingerprint"][place]}
