"""Trained weights on the user's disk, so that a teacher is trained once and its labels keep one identity.

Nothing pickled is loaded. Knows nothing of what is trained, or of label sets.
"""

import os
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn


def demo_folder() -> Path:
    """Where weights are kept: ``LOGITCACHE_DEMO_FOLDER``, else ``logitcache/demo`` in the user's cache folder."""
    if folder := os.environ.get("LOGITCACHE_DEMO_FOLDER"):
        return Path(folder)
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "logitcache" / "demo"


def trained_once(name: str, train: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """The weights kept under a name; the first call trains and keeps them, and says so on stderr."""
    path = demo_folder() / f"{name}.npz"
    weights = _read(path)
    if weights is None:
        click.echo(f"Training the demo's teacher; its weights are kept in {path}", err=True)
        _keep(path, train().state_dict())
        weights = _read(path)
        if weights is None:
            raise OSError(f"the weights just written to {path} cannot be read back")
    return weights


def _read(path: Path) -> dict[str, Tensor] | None:
    """Weights kept before; None if there are none, or if the file is damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except FileNotFoundError:
        return None
    except (ValueError, EOFError, zipfile.BadZipFile):
        path.unlink(missing_ok=True)
        return None


def _keep(path: Path, weights: dict[str, Tensor]) -> None:
    """Write weights so that they appear whole or not at all; of two processes that trained at once, the first wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in weights.items()}
    with NamedTemporaryFile(dir=path.parent, prefix=path.name) as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(file.name, path)
