"""Teachers: from a SPEC to something that labels a batch, with an id that changes when its weights do.

A teacher is a `torch.nn.Module`, or a callable that says its own ``teacher_id``. It is run in eval mode, under
``torch.inference_mode``, and whatever it returns is checked before a row of it is believed.
"""

import hashlib
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from logitcache.labels.errors import InvalidRequest, TeacherFault, shown
from logitcache.labels.identity import MAX_CLASSES, TeacherId
from logitcache.server import specs
from logitcache.server.top_k import faulty_rows


class Teacher:
    """A teacher on its device.

    Attributes:
        id: name, digest of the weights, digest of the preprocessing.
        device: where its forward runs and where the selection is made.
        dtype: of its parameters, as text; ``"unknown"`` for a plain callable.
    """

    def __init__(self, forward: Callable[[torch.Tensor], Any], id: TeacherId, device: torch.device, dtype: str) -> None:
        self._forward, self.id, self.device, self.dtype = forward, id, device, dtype

    def logits(self, inputs: torch.Tensor, examples: np.ndarray, classes: int | None) -> torch.Tensor:
        """Logits of a batch, (batch, classes), on the teacher's device.

        ``examples`` are the ids of the batch, for messages; ``classes`` is how many there must be, None for the first
        batch.

        Raises:
            TeacherFault: the teacher raised; returned no float tensor of that shape; or gave NaN, +inf or only -inf.
        """
        which = f"examples {examples[0]:,} to {examples[-1]:,}"
        try:
            with torch.inference_mode():
                logits = self._forward(inputs.to(self.device, non_blocking=True))
        except torch.OutOfMemoryError as error:
            raise TeacherFault(f"the teacher ran out of memory on {which}: use a smaller --batch-size") from error
        except Exception as error:
            raise TeacherFault(f"the teacher raised {type(error).__name__} on {which}: {error}") from error
        _check(logits, len(examples), classes, which)
        with torch.inference_mode():
            faulty = faulty_rows(logits)
        if faulty:
            ids = [int(examples[row]) for row in faulty]
            reason = next(iter(faulty.values()))
            raise TeacherFault(
                f"the teacher gave {reason} for example {ids[0]:,}; "
                f"{len(ids)} of the {len(examples)} examples of this batch "
                f"cannot be stored ({shown(ids)})",
                ids=ids,
            )
        checked: torch.Tensor = logits
        return checked


def _check(logits: Any, batch: int, classes: int | None, which: str) -> None:
    if not isinstance(logits, torch.Tensor):
        raise TeacherFault(
            f"the teacher returned {type(logits).__name__} for {which}, not a tensor of logits: "
            "return the tensor alone (of an output object, its .logits)"
        )
    if not logits.dtype.is_floating_point:
        raise TeacherFault(f"the teacher returned {logits.dtype} for {which}, not floating-point logits")
    if logits.ndim != 2 or logits.shape[0] != batch:
        raise TeacherFault(
            f"the teacher returned shape {tuple(logits.shape)} for {which}, not (batch, classes) = ({batch}, ...)"
        )
    if classes is not None and logits.shape[1] != classes:
        raise TeacherFault(f"the teacher returned {logits.shape[1]} classes for {which}, before it was {classes}")
    if not 1 <= logits.shape[1] <= MAX_CLASSES:
        raise TeacherFault(f"the teacher returned {logits.shape[1]} classes for {which}")


def load_teacher(spec: str, device: str | None) -> Teacher:
    """The teacher that a SPEC names, ready to label on ``device`` (default: CUDA where there is one, else the CPU).

    Raises:
        SpecNotFound: the SPEC names nothing.
        TeacherFault: making it raised, or it is neither a module nor a callable with a ``teacher_id``.
        InvalidRequest: there is no such device.
    """
    place = _device(device)
    made = specs.load(spec, "teacher", TeacherFault)
    if isinstance(made, torch.nn.Module):
        try:
            made.eval().requires_grad_(False)
            id = _own_id(made, spec) or TeacherId(spec, weights_digest(made), _preprocessing(made))
            parameter = next(itertools.chain(made.parameters(), made.buffers()), None)
            dtype = "none" if parameter is None else str(parameter.dtype).removeprefix("torch.")
            return Teacher(made.to(place), id, place, dtype)
        except (RuntimeError, ValueError, TypeError) as error:
            first = str(error).partition("\n")[0]
            raise TeacherFault(f"the weights of {spec!r} cannot be hashed or moved to {place}: {first}") from error
    own = _own_id(made, spec)
    if not callable(made) or own is None:
        raise TeacherFault(
            f"the teacher {spec!r} returned {type(made).__name__}: return a torch.nn.Module, or a callable with a "
            "`teacher_id` attribute that changes whenever its answers do"
        )
    return Teacher(made, own, place, "unknown")


def _own_id(made: Any, spec: str) -> TeacherId | None:
    own = getattr(made, "teacher_id", None)
    if own is None or isinstance(own, TeacherId):
        return own
    if not isinstance(own, str) or not own:
        raise TeacherFault(
            f"the teacher {spec!r} has a teacher_id of type {type(own).__name__}: use a text or a TeacherId"
        )
    return TeacherId(spec, own, _preprocessing(made))


def _preprocessing(made: Any) -> str:
    """Digest of the text that a teacher declares about its preprocessing; empty when it declares none."""
    text = getattr(made, "preprocessing", "")
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}" if isinstance(text, str) and text else ""


def _device(device: str | None) -> torch.device:
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise InvalidRequest(f"--device {device!r} cannot be used here: {first}") from None
    return place


def weights_digest(module: torch.nn.Module) -> str:
    """``sha256:…`` over name, dtype, shape and bytes of every parameter and buffer, by name.

    Buffers that a checkpoint would leave out count too, since they take part in the forward. The same weights have the
    same digest on every device; the code of the forward is not covered.
    """
    state = hashlib.sha256()
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    for name, tensor in sorted(tensors.items()):
        whole = tensor.detach().cpu().contiguous()
        state.update(f"{name}:{whole.dtype}:{tuple(whole.shape)}:".encode())
        state.update(whole.reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{state.hexdigest()}"
