"""What the runs learn: digits, modules of the standard library by their text, and its language.

Each task gives data, models of a width, a loss, and what is held out. All data comes with an installed library; nothing
is downloaded. Knows nothing of servers or label sets.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from benchmarks.sequence.training import Quality, quality
from sklearn.datasets import load_digits
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.model_selection import train_test_split
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from logitcache.client import distillation_loss, with_ids
from logitcache.server.demo.corpus import LONGEST, Examples, examples_of
from logitcache.server.demo.language import NO_LABEL, collate, forward, next_labels
from logitcache.server.demo.sources import standard_library
from logitcache.server.demo.transformer import Transformer


class Task(Protocol):
    """What a run learns."""

    name: str
    classes: int
    ids: Any
    """Where a batch has its ids, as `attach` takes it."""

    def data(self) -> Dataset[Any]:
        """All training examples, always in the same order; items as ``precompute`` takes them."""

    def model(self, width: int) -> nn.Module:
        """A model with weights drawn from torch's generator."""

    def optimizer(self, model: nn.Module, rate: float) -> torch.optim.Optimizer:
        """For a learning rate that is a multiple of the task's own."""

    def loader(self, data: Dataset[Any], seed: int) -> DataLoader[Any]:
        """Batches of data in an order that the seed alone decides, with ids."""

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        """Logits of a batch."""

    def hard(self, logits: Tensor, batch: Any, smoothing: float) -> Tensor:
        """Cross-entropy with the targets, mean of all that have one."""

    def live(self, logits: Tensor, batch: Any, teacher: Tensor, temperature: float, alpha: float) -> Tensor:
        """``alpha T² KL(teacher || student) + (1 - alpha) CE`` over all classes (Hinton et al. 2015)."""

    def cached(
        self, logits: Tensor, batch: Any, soft: Any, temperature: float, alpha: float, tail: str = "bucket"
    ) -> Tensor:
        """The same from soft labels."""

    def evaluate(self, model: nn.Module) -> Quality:
        """On what is held out."""


def begun(task: Task, width: int, seed: int) -> nn.Module:
    """A model with the first weights of a seed; the caller's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return task.model(width)


@dataclass(frozen=True)
class Split:
    """Inputs and targets to train on, and those that are held out."""

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]


class Pairs(Dataset[tuple[Tensor, int]]):
    """An input and its target."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.inputs[index], int(self.targets[index])

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        """A batch at once: it is what makes loading cheap beside a step."""
        return list(zip(self.inputs[indices], self.targets[indices].tolist(), strict=True))


class Classified:
    """A task with one input and one target an example."""

    ids = -1

    def __init__(self, split: Callable[[], Split], classes: int, batch: int, rate: float) -> None:
        self._split, self.classes, self.batch, self._rate = split, classes, batch, rate

    def data(self) -> Dataset[Any]:
        """See `Task`."""
        return Pairs(*self._split().train)

    def optimizer(self, model: nn.Module, rate: float) -> torch.optim.Optimizer:
        """See `Task`."""
        return torch.optim.AdamW(model.parameters(), lr=self._rate * rate)

    def loader(self, data: Dataset[Any], seed: int) -> DataLoader[Any]:
        """See `Task`."""
        order = torch.Generator().manual_seed(seed)
        numbered = cast("Dataset[Any]", with_ids(cast("Any", data)))
        return DataLoader(numbered, batch_size=self.batch, shuffle=True, generator=order)

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        """See `Task`."""
        logits: Tensor = model(batch[0])
        return logits

    def hard(self, logits: Tensor, batch: Any, smoothing: float) -> Tensor:
        """See `Task`."""
        return F.cross_entropy(logits, batch[1], label_smoothing=smoothing)

    def live(self, logits: Tensor, batch: Any, teacher: Tensor, temperature: float, alpha: float) -> Tensor:
        """See `Task`."""
        divergence = F.kl_div(
            F.log_softmax(logits / temperature, dim=1),
            F.log_softmax(teacher / temperature, dim=1),
            log_target=True,
            reduction="batchmean",
        )
        return alpha * temperature**2 * divergence + (1 - alpha) * F.cross_entropy(logits, batch[1])

    def cached(
        self, logits: Tensor, batch: Any, soft: Any, temperature: float, alpha: float, tail: str = "bucket"
    ) -> Tensor:
        """See `Task`."""
        how: Any = tail
        return distillation_loss(logits, soft, targets=batch[1], temperature=temperature, alpha=alpha, tail=how)

    def evaluate(self, model: nn.Module) -> Quality:
        """See `Task`."""
        inputs, targets = self._split().held_out
        model.eval()
        with torch.inference_mode():
            return quality(model(inputs), targets)


class DigitsTask(Classified):
    """scikit-learn's 1,797 digits, in full: 1,257 to train on, 540 held out; a small convolutional network."""

    name = "digits"

    def __init__(self) -> None:
        super().__init__(_digits, classes=10, batch=64, rate=0.004)

    def model(self, width: int) -> nn.Module:
        """See `Task`."""
        return nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * width, 10),
        )


@lru_cache(maxsize=1)
def _digits() -> Split:
    pixels, targets = load_digits(return_X_y=True)
    images = (pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    parts = train_test_split(images, targets.astype(np.int64), test_size=0.3, random_state=0, stratify=targets)
    train, held_out, train_targets, held_out_targets = map(torch.from_numpy, parts)
    return Split((train, train_targets), (held_out, held_out_targets))


MODULES, CHUNKS, FEATURES = 40, 320, 1024
"""Classes of the task on modules, texts of each, and buckets that their words are hashed to."""


class ModulesTask(Classified):
    """Five lines of the standard library's sources: which of its 40 largest modules and packages are they from?

    Words are hashed to 1,024 features (scikit-learn's `HashingVectorizer`, word 1- and 2-grams). The last quarter of
    each module's text is held out: other files where a package has several, else the end of its file.
    """

    name = "modules"

    def __init__(self) -> None:
        super().__init__(_modules, classes=MODULES, batch=128, rate=0.002)

    def model(self, width: int) -> nn.Module:
        """See `Task`."""
        return nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, MODULES))


@lru_cache(maxsize=1)
def _modules() -> Split:
    texts: dict[str, list[str]] = {}
    for source in standard_library(12_000_000):
        top = source.path.partition("/")[0].removesuffix(".py")
        chunks = ["".join(source.lines[at : at + 5]) for at in range(0, len(source.lines), 5)]
        texts.setdefault(top, []).extend(chunk for chunk in chunks if len(chunk) > 80)
    largest = sorted(texts, key=lambda top: (-len(texts[top]), top))[:MODULES]
    vectorizer = HashingVectorizer(n_features=FEATURES, ngram_range=(1, 2), alternate_sign=True, norm="l2")
    inputs: list[np.ndarray] = []
    targets: list[int] = []
    for number, top in enumerate(largest):
        spaced = texts[top][:: max(1, len(texts[top]) // CHUNKS)][:CHUNKS]
        inputs.append(vectorizer.transform(spaced).toarray().astype(np.float32))
        targets += [number] * len(spaced)
    # The last quarter of each module is held out: its files, or the end of its file.
    held = np.concatenate([np.arange(len(part)) >= 0.75 * len(part) for part in inputs])
    values, classes = torch.from_numpy(np.concatenate(inputs)), torch.tensor(targets)
    return Split((values[~held], classes[~held]), (values[held], classes[held]))


VOCABULARY, TEXT_BYTES, TRAINED, HELD_OUT = 8192, 6_000_000, 24_000, 8_000
"""Of the language: tokens that there are, text they are found in, and tokens that are trained on and held out."""

QUICK_TEXT_BYTES, QUICK_TRAINED, QUICK_HELD_OUT = 800_000, 3_000, 2_000


def make_small() -> None:
    """Less of the language, in this process: for a smoke run."""
    global TEXT_BYTES, TRAINED, HELD_OUT
    TEXT_BYTES, TRAINED, HELD_OUT = QUICK_TEXT_BYTES, QUICK_TRAINED, QUICK_HELD_OUT


class LanguageTask:
    """A causal language model of the standard library's text: a vocabulary of 8,192, examples of 16 to 256 tokens."""

    name = "language"
    classes = VOCABULARY
    ids = "id"
    batch = 8

    def __init__(self, tokens: int | None = None) -> None:
        self._tokens = tokens or TRAINED

    def data(self) -> Dataset[Any]:
        """See `Task`."""
        return _corpus()[0].about(self._tokens)

    def model(self, width: int) -> nn.Module:
        """See `Task`."""
        return Transformer(VOCABULARY, width=width, layers=2, heads=2, longest=LONGEST)

    def optimizer(self, model: nn.Module, rate: float) -> torch.optim.Optimizer:
        """See `Task`."""
        return torch.optim.AdamW(model.parameters(), lr=0.003 * rate)

    def loader(self, data: Dataset[Any], seed: int) -> DataLoader[Any]:
        """See `Task`."""
        order = torch.Generator().manual_seed(seed)
        return DataLoader(data, batch_size=self.batch, shuffle=True, generator=order, collate_fn=collate)

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        """See `Task`."""
        return forward(model, batch)

    def hard(self, logits: Tensor, batch: Any, smoothing: float) -> Tensor:
        """See `Task`."""
        labels = next_labels(batch).flatten()
        return F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=NO_LABEL, label_smoothing=smoothing)

    def live(self, logits: Tensor, batch: Any, teacher: Tensor, temperature: float, alpha: float) -> Tensor:
        """See `Task`. An example's last token has no next one, so it has the divergence alone, whole."""
        labels, held = next_labels(batch).flatten(), batch["attention_mask"].flatten()
        student, shown = logits.flatten(0, 1), teacher.flatten(0, 1)
        log_p, log_t = (F.log_softmax(each / temperature, dim=1) for each in (student, shown))
        soft = temperature**2 * F.kl_div(log_p, log_t, log_target=True, reduction="none").sum(dim=1)
        hard = F.cross_entropy(student, labels, ignore_index=NO_LABEL, reduction="none")
        values = torch.where(labels == NO_LABEL, soft, alpha * soft + (1 - alpha) * hard)
        mean: Tensor = (values * held).sum() / held.sum()
        return mean

    def cached(
        self, logits: Tensor, batch: Any, soft: Any, temperature: float, alpha: float, tail: str = "bucket"
    ) -> Tensor:
        """See `Task`."""
        how: Any = tail
        return distillation_loss(
            logits,
            soft,
            targets=batch["labels"],
            attention_mask=batch["attention_mask"],
            temperature=temperature,
            alpha=alpha,
            tail=how,
        )

    def evaluate(self, model: nn.Module) -> Quality:
        """See `Task`."""
        logits, wanted = [], []
        model.eval()
        held_out = _corpus()[1].about(HELD_OUT)
        with torch.inference_mode():
            for batch in DataLoader(held_out, batch_size=16, collate_fn=collate):
                labels = next_labels(batch)
                there = labels != NO_LABEL
                logits.append(forward(model, batch)[there])
                wanted.append(labels[there])
            return quality(torch.cat(logits), torch.cat(wanted))


@lru_cache(maxsize=1)
def _corpus() -> tuple[Examples, Examples]:
    sources = standard_library(TEXT_BYTES)
    trained, held_out = [one for at, one in enumerate(sources) if at % 10], sources[::10]
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=sorted(ByteLevel.alphabet()), show_progress=False)
    tokenizer.train_from_iterator((list(source.lines) for source in trained), trainer)

    def examples(chosen: Sequence[Any]) -> Examples:
        return Examples([example for source in chosen for example in examples_of(source, tokenizer)])

    return examples(trained), examples(held_out)


def with_more_text(task: Task, times: int) -> Task:
    """The same task with about so many times its tokens to train on, of the same files; once is the task itself.

    They are other examples, but for a few: what the task is trained on, such a teacher has mostly not seen.
    """
    return task if times == 1 else LanguageTask(times * TRAINED)


TASKS: dict[str, Callable[[], Task]] = {"digits": DigitsTask, "modules": ModulesTask, "language": LanguageTask}


def part_of(data: Dataset[Any], ordinals: Sequence[int]) -> Dataset[Any]:
    """Some of the examples, in this order; their ids are those of their places in it, unless they have their own."""
    return Subset(data, list(ordinals))


def digest_of(model: nn.Module) -> str:
    """sha256 of a model's weights, for telling whether two runs ended alike."""
    state = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        state.update(name.encode() + value.numpy().tobytes())
    return state.hexdigest()
