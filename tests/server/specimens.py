"""Teachers and datasets, good and bad, that tests name by SPEC."""

import os
import random
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch

from logitcache.labels.identity import TeacherId

EXAMPLES = 9000
FEATURES = 6
CLASSES = 11


def good_teacher() -> torch.nn.Module:
    torch.manual_seed(3)
    first = torch.nn.Linear(FEATURES, 16)
    with torch.no_grad():
        first.weight[:, 0] = 0  # the first feature is the ordinal
    return torch.nn.Sequential(first, torch.nn.BatchNorm1d(16), torch.nn.Dropout(0.5), torch.nn.Linear(16, CLASSES))


def good_teacher_like() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(FEATURES, CLASSES))


class Faulty(torch.nn.Module):
    """Answers well until it meets an example, then does something else with its logits."""

    def __init__(self, at: int, change: Any) -> None:
        super().__init__()
        self.net = good_teacher_like()
        self.at, self.change = at, change

    def forward(self, inputs: torch.Tensor) -> Any:
        logits = self.net(inputs)
        ordinals = inputs[:, 0]
        here = ordinals == self.at
        return self.change(logits, here) if bool(here.any()) else logits


def _poison(value: float) -> Any:
    def change(logits: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
        return torch.where(here[:, None] & (torch.arange(CLASSES) == 2), value, logits)

    return change


def _raise(logits: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("the teacher's own trouble")


LATE = 5000
"""An example of the second shard of 4,096."""


def nan_teacher() -> Faulty:
    torch.manual_seed(0)
    return Faulty(LATE, _poison(float("nan")))


def inf_teacher() -> Faulty:
    torch.manual_seed(0)
    return Faulty(LATE, _poison(float("inf")))


def silent_teacher() -> Faulty:
    torch.manual_seed(0)
    return Faulty(LATE, lambda logits, here: torch.where(here[:, None], -torch.inf, logits))


def raising_teacher() -> Faulty:
    torch.manual_seed(0)
    return Faulty(LATE, _raise)


def growing_teacher() -> Faulty:
    torch.manual_seed(0)
    return Faulty(LATE, lambda logits, here: torch.cat([logits, logits[:, :1]], 1))


def mended_teacher() -> Faulty:
    """Has the weights of the faulty ones, and no fault."""
    torch.manual_seed(0)
    return Faulty(-1, None)


def padded_teacher() -> Faulty:
    """Never predicts its last two classes."""
    torch.manual_seed(0)
    model = Faulty(-1, None)
    with torch.no_grad():
        model.net[0].bias[-2:] = -torch.inf  # type: ignore[index]
    return model


class Tuples(torch.nn.Module):
    def forward(self, inputs: torch.Tensor) -> Any:
        return (inputs,)


class Integers(torch.nn.Module):
    def forward(self, inputs: torch.Tensor) -> Any:
        return torch.zeros(len(inputs), CLASSES, dtype=torch.int64)


class Sequences(torch.nn.Module):
    def forward(self, inputs: torch.Tensor) -> Any:
        return torch.zeros(len(inputs), 3, CLASSES)


class Pooled(torch.nn.Module):
    def forward(self, inputs: torch.Tensor) -> Any:
        return torch.zeros(1, CLASSES)


def plain_function() -> Any:
    return lambda inputs: inputs


class Named:
    """A callable that says who it is."""

    teacher_id = "checkpoint 7"
    preprocessing = "crop 224"

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ torch.ones(FEATURES, CLASSES) + torch.arange(CLASSES)


def named_teacher() -> Named:
    return Named()


class WhollyNamed(Named):
    teacher_id = TeacherId("mine", "weights", "preprocessing")  # type: ignore[assignment]


def broken_maker() -> Any:
    raise OSError("checkpoint.pt: no such file")


not_callable = 3


class Data:
    """Map-style; item ``i`` has ``i`` as its first feature."""

    def __init__(self, examples: int = EXAMPLES, order: Any = None) -> None:
        inputs = torch.randn(examples, FEATURES, generator=torch.Generator().manual_seed(9))
        inputs[:, 0] = torch.arange(examples)
        self.inputs = inputs if order is None else inputs[order]

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Any:
        return self.inputs[index], index % CLASSES


def data() -> Data:
    return Data()


def small_data() -> Data:
    return Data(300)


def shrunk() -> Data:
    return Data(EXAMPLES - 1)


def reordered() -> Data:
    order = torch.arange(EXAMPLES)
    order[[10, 4000]] = order[[4000, 10]]
    return Data(order=order)


class Relabelled(Data):
    def __getitem__(self, index: int) -> Any:
        return self.inputs[index], (index + (index == LATE)) % CLASSES


def relabelled() -> Data:
    return Relabelled()


class Mappings(Data):
    def __getitem__(self, index: int) -> Any:
        return {"input": self.inputs[index].numpy(), "labels": 0}


class Tensors(Data):
    def __getitem__(self, index: int) -> Any:
        return self.inputs[index]


class Augmented(Data):
    def __getitem__(self, index: int) -> Any:
        return self.inputs[index] + random.random()


class SometimesAugmented(Data):
    """Only its last example changes, as with a bug in one file's decoder."""

    def __getitem__(self, index: int) -> Any:
        return self.inputs[index] + (random.random() if index == len(self) - 1 else 0)


class Raising(Data):
    def __getitem__(self, index: int) -> Any:
        if index == LATE:
            raise ValueError("cannot identify image file")
        return self.inputs[index]


class Ragged(Data):
    def __getitem__(self, index: int) -> Any:
        return self.inputs[index][: FEATURES - (index == LATE)]


class Texts(Data):
    def __getitem__(self, index: int) -> Any:
        return "a text", 0


class Triples(Data):
    def __getitem__(self, index: int) -> Any:
        return self.inputs[index], 0, 1


class Both(Data):
    def __getitem__(self, index: int) -> Any:
        return {"input_ids": np.arange(5), "input": self.inputs[index]}


class Targets(Data):
    """The last target is beyond the classes."""

    def __getitem__(self, index: int) -> Any:
        return self.inputs[index], CLASSES if index == len(self) - 1 else 0


class Nameless(Data):
    def __getitem__(self, index: int) -> Any:
        return {"image": self.inputs[index]}


def empty() -> Data:
    return Data(0)


def iterable() -> Any:
    return iter([1, 2])


class Differentiable(Data):
    """Inputs that carry a graph, as from a learned transform."""

    def __getitem__(self, index: int) -> Any:
        return self.inputs[index].clone().requires_grad_()


class Dying(Data):
    """Kills the process that reads it, if that is a worker."""

    def __getitem__(self, index: int) -> Any:
        if index == LATE and torch.utils.data.get_worker_info() is not None:
            os._exit(3)
        return self.inputs[index]


class Wandering(Data):
    """Changes the working folder."""

    def __init__(self) -> None:
        super().__init__(300)
        os.chdir("/")


def changed_in_the_second_shard() -> Data:
    made = Data()
    made.inputs[LATE] += 1
    return made


def lazy_teacher() -> torch.nn.Module:
    return torch.nn.LazyLinear(CLASSES)


class Counting(torch.nn.Module):
    """Notes how many batches of inputs are alive when a forward begins."""

    alive: ClassVar["weakref.WeakSet[torch.Tensor]"] = weakref.WeakSet()
    most = 0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = good_teacher_like()

    def forward(self, inputs: torch.Tensor) -> Any:
        storages = {tensor.untyped_storage().data_ptr() for tensor in Counting.alive}
        Counting.most = max(Counting.most, len(storages))
        Counting.alive.add(inputs)
        assert not self.training
        assert torch.is_inference_mode_enabled()
        return self.net(inputs)


def with_buffer(value: float) -> torch.nn.Module:
    model = good_teacher_like()
    model.register_buffer("scale", torch.tensor(value), persistent=False)
    return model


class Watched(torch.nn.Module):
    """Tells a test the first ordinal of each batch before it labels it."""

    tell: ClassVar[Callable[[int], None]]

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = good_teacher_like()

    def forward(self, inputs: torch.Tensor) -> Any:
        Watched.tell(int(inputs[0, 0]))
        return self.net(inputs)
