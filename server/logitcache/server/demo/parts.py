"""The demo's two parts, told in one form: what is labelled, what is learnt from it, and how the two are compared."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from logitcache.server.demo import digits, digits_agreement, language, language_agreement
from logitcache.server.demo.digits_task import TEMPERATURE as DIGITS_TEMPERATURE
from logitcache.server.demo.digits_task import DigitsTask
from logitcache.server.demo.language_task import TEMPERATURE as LANGUAGE_TEMPERATURE
from logitcache.server.demo.language_task import LanguageTask
from logitcache.server.demo.report import Words
from logitcache.server.demo.training import Task

COMPARED_BATCHES, QUICK_COMPARED_BATCHES = 8, 4


class Agreement(Protocol):
    """How far cached labels were from the live teacher; ``str`` of it is what is printed."""

    @property
    def holds(self) -> bool:
        """No further than rounding explains."""

    @property
    def closest_to_allowed(self) -> float:
        """How far, in parts of what rounding explains."""


@dataclass(frozen=True)
class Part:
    """One part of the demo, in full or quick.

    Attributes:
        name: of the label set, and of the files that are written.
        subject: what it is about, for people.
        teacher, dataset: SPECs, as ``logitcache precompute`` takes them.
        make_teacher: what the first of them names.
        examples: how many are labelled, in words.
        top_k, temperatures, batch_size: as ``logitcache precompute`` takes them.
        temperature: of the students' training.
        compare: labels and the live teacher, for each temperature that is compared.
        promise: what the figures do not say, or nothing.
    """

    name: str
    subject: str
    task: Task
    words: Words
    teacher: str
    dataset: str
    make_teacher: Callable[[], nn.Module]
    steps_an_epoch: int
    epochs: int
    top_k: int
    temperatures: tuple[float, ...]
    temperature: float
    batch_size: int
    compare: Callable[[Any, nn.Module], dict[str, Agreement]]
    promise: str = ""


def digits_part(quick: bool) -> Part:
    """Handwritten digits: a row an image, all classes stored, and every step's loss compared."""
    task, epochs = DigitsTask(), 2 if quick else 16

    def compare(labels: Any, teacher: nn.Module) -> dict[str, Agreement]:
        return {"agreement": digits_agreement.compare_every_step(labels, teacher, task, epochs)}

    return Part(
        name="digits",
        subject="Handwritten digits: a row of soft labels for each image",
        task=task,
        words=Words("test accuracy", "test loss", False, 80, "the test digits"),
        teacher=f"{digits.__name__}:teacher",
        dataset=f"{digits.__name__}:train_set",
        make_teacher=digits.teacher,
        steps_an_epoch=-(-len(digits.train_set()) // digits.BATCH),
        epochs=epochs,
        top_k=digits.CLASSES,
        temperatures=(DIGITS_TEMPERATURE,),
        temperature=DIGITS_TEMPERATURE,
        batch_size=digits.BATCH,
        compare=compare,
    )


def language_part(quick: bool) -> Part:
    """Texts of the standard library: a row a token, 64 of 2,048 classes stored, ids that are texts."""
    size, kind = (language.QUICK, "quick_") if quick else (language.FULL, "")
    task, data = LanguageTask(size), language.train_set(size)

    def compare(labels: Any, teacher: nn.Module) -> dict[str, Agreement]:
        steps = QUICK_COMPARED_BATCHES if quick else COMPARED_BATCHES
        return {
            f"agreement_at_{temperature:g}": language_agreement.compare_batches(
                labels, teacher, task, temperature, steps
            )
            for temperature in (1.0, 2.0)
        }

    return Part(
        name="language",
        subject="Python's standard library as a language: a row of soft labels for each token",
        task=task,
        words=Words("next token right", "held-out loss", True, None, "files held out"),
        teacher=f"{language.__name__}:{kind}teacher",
        dataset=f"{language.__name__}:{kind}train_set",
        make_teacher=lambda: language.teacher(size),
        steps_an_epoch=-(-len(data) // language.BATCH),
        epochs=2 if quick else 3,
        top_k=64,
        temperatures=(2.0,),
        temperature=LANGUAGE_TEMPERATURE,
        batch_size=language.BATCH,
        compare=compare,
        promise=(
            "This teacher and its students are far too small, and trained far too shortly, for their quality to say "
            "anything; what it shows is what labels cost, and that they are the teacher's own."
        ),
    )


PARTS: dict[str, Callable[[bool], Part]] = {"digits": digits_part, "language": language_part}
