"""Teachers: from a SPEC to something that labels a batch, with an id that changes when its weights do.

A teacher is a `torch.nn.Module`, or a callable that says its own ``teacher_id``. It is run in eval mode, under
``torch.inference_mode``, and the shape of whatever it returns is checked before a row of it is believed.
"""

import hashlib
import inspect
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch

from logitcache.labels.errors import InvalidRequest, TeacherFault
from logitcache.labels.identity import MAX_CLASSES, TeacherId
from logitcache.labels.selection.transfer import to_device
from logitcache.server.labelling import specs
from logitcache.server.labelling.batches import Batch

ALONE_S = 30.0
"""For how long the examples of a batch on which the teacher failed are tried one by one."""


class Teacher:
    """A teacher on its device.

    Attributes:
        id: name, digest of the weights, digest of the preprocessing.
        device: where its forward runs and where the selection is made.
        dtype: of its parameters, as text; ``"unknown"`` for a plain callable.
    """

    def __init__(self, forward: Callable[..., Any], id: TeacherId, device: torch.device, dtype: str) -> None:
        self._forward, self.id, self.device, self.dtype = forward, id, device, dtype
        self._takes_mask = _takes(forward, "attention_mask")

    @property
    def device_name(self) -> str:
        """Of the device, for people: a GPU's model."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device)

    def logits(self, batch: Batch, classes: int | None) -> torch.Tensor:
        """Logits of a batch, (batch, classes) or of token sequences (batch, longest, classes), on the teacher's device.

        Token sequences are given as ``forward(input_ids)``, with ``attention_mask=`` if it takes one. ``classes`` is
        how many there must be, None for the first batch. Whether rows are distributions is not checked here.

        Where it fails on a batch, the examples are tried one by one, so that those on which it fails alone are named.

        Raises:
            TeacherFault: the teacher raised, or returned no float tensor of that shape.
        """
        try:
            return self._labelled(batch, classes)
        except TeacherFault as fault:
            # Memory is short whatever the example; and after an error on a GPU everything there fails.
            in_vain = isinstance(fault.__cause__, torch.OutOfMemoryError) or "CUDA error" in fault.message
            if in_vain or len(batch.ordinals) == 1:
                raise TeacherFault(fault.message + batch.ids_told()) from fault.__cause__
            failing, told = self._tried_alone(batch, classes)
            raise TeacherFault(f"{fault.message}; tried alone, {told}", ids=batch.ids.at(failing)) from fault.__cause__

    def _tried_alone(self, batch: Batch, classes: int | None) -> tuple[list[int], str]:
        """Which examples of a batch fail by themselves, and what to say of that."""
        failing, tried, deadline = [], 0, time.monotonic() + ALONE_S
        while tried < len(batch.ordinals) and (not tried or time.monotonic() < deadline):
            try:
                self._labelled(batch.alone(tried), classes)
            except TeacherFault:
                failing.append(tried)
            tried += 1
        of = f"of the {tried}" if tried == len(batch.ordinals) else f"of the first {tried}, for lack of time,"
        if not failing:
            return failing, f"none {of} fails{batch.ids_told()}: another --batch-size may do"
        if len(failing) == tried > 1:
            return failing, f"each {of} fails{batch.ids_told()}"
        return failing, f"{len(failing)} {of} cannot be labelled, first {batch.named(failing[0])}"

    def _labelled(self, batch: Batch, classes: int | None) -> torch.Tensor:
        try:
            with torch.inference_mode():
                logits = self._called(batch)
        except torch.OutOfMemoryError as error:
            raise TeacherFault(f"the teacher ran out of memory on {batch}: use a smaller --batch-size") from error
        except Exception as error:
            raise TeacherFault(
                f"the teacher raised {type(error).__name__} on {batch}: {error}{_about_tokens(batch, error)}"
            ) from error
        return _checked(logits, batch, classes)

    def _called(self, batch: Batch) -> Any:
        inputs = to_device(batch.inputs, self.device)
        if batch.lengths is None or not self._takes_mask:
            return self._forward(inputs)
        return self._forward(inputs, attention_mask=to_device(batch.mask, self.device))


def _takes(forward: Callable[..., Any], name: str) -> bool:
    """Can it be called with an argument of this name?"""
    # A compiled module takes anything and hands it on.
    whole = getattr(forward, "_orig_mod", forward)
    try:
        parameters = inspect.signature(getattr(whole, "forward", whole)).parameters.values()
    except (TypeError, ValueError):
        return False
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return any(
        one.kind is inspect.Parameter.VAR_KEYWORD or (one.name == name and one.kind in named) for one in parameters
    )


def _about_tokens(batch: Batch, error: Exception) -> str:
    """What an index out of range mostly means where the inputs are tokens."""
    if batch.lengths is None or not isinstance(error, IndexError):
        return ""
    return (
        f"; the largest of these token ids is {int(batch.inputs.max()):,}, the longest example has "
        f"{int(batch.lengths.max()):,} tokens: is one beyond the teacher's vocabulary, or longer than it can read?"
    )


def _checked(logits: Any, batch: Batch, classes: int | None) -> torch.Tensor:
    if not isinstance(logits, torch.Tensor):
        raise TeacherFault(
            f"the teacher returned {type(logits).__name__} for {batch}, not a tensor of logits: "
            "return the tensor alone (of an output object, its .logits)"
        )
    if not logits.dtype.is_floating_point:
        raise TeacherFault(f"the teacher returned {logits.dtype} for {batch}, not floating-point logits")
    expected: tuple[int, ...] = (len(batch.ordinals),)
    words = "(batch, classes)"
    if batch.lengths is not None:
        expected, words = tuple(batch.inputs.shape), "(batch, length, classes), a row a token"
    if logits.ndim != len(expected) + 1 or tuple(logits.shape[:-1]) != expected:
        wanted = ", ".join(map(str, expected))
        raise TeacherFault(
            f"the teacher returned shape {tuple(logits.shape)} for {batch}, not {words} = ({wanted}, ...)"
        )
    if classes is not None and logits.shape[-1] != classes:
        raise TeacherFault(f"the teacher returned {logits.shape[-1]} classes for {batch}, before it was {classes}")
    if not 1 <= logits.shape[-1] <= MAX_CLASSES:
        raise TeacherFault(f"the teacher returned {logits.shape[-1]} classes for {batch}")
    return logits


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
