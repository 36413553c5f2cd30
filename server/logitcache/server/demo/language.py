"""The demo's second teacher and data: a causal language model, trained on the standard library's own text.

`teacher` and `train_set` are what ``logitcache precompute`` is given as SPECs; `quick_teacher` and `quick_train_set`
are less of each. The recipe is fixed and the trained weights are kept, so with one Python a second call gives the same
teacher, and its labels the same identity. Knows nothing of label sets or of students.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Sampler

from logitcache.server.demo.corpus import LONGEST, VOCABULARY, Examples, read_corpus
from logitcache.server.demo.transformer import Transformer
from logitcache.server.demo.weights import trained_once

BATCH = 8
NO_LABEL = -100
RECIPE = 1
"""Raised whenever the teacher's network or training changes: weights of an older recipe are then not found."""


@dataclass(frozen=True)
class Size:
    """How much of everything: of the text in bytes, and in tokens of what the teacher is trained on, of what it labels
    and students are trained on, and of what both are tested on.
    """

    text_bytes: int
    trained: int
    labelled: int
    held_out: int


FULL = Size(text_bytes=1_600_000, trained=200_000, labelled=32_000, held_out=16_000)
QUICK = Size(text_bytes=400_000, trained=60_000, labelled=12_000, held_out=6_000)


def train_set(size: Size | None = None) -> Examples:
    """The examples that are labelled and that students are trained on, always in the same order."""
    size = size or FULL
    return read_corpus(size.text_bytes).train.about(size.labelled)


def quick_train_set() -> Examples:
    """Fewer of them."""
    return train_set(QUICK)


def held_out_set(size: Size) -> Examples:
    """Examples of files that neither tokenizer nor teacher nor student is trained on."""
    return read_corpus(size.text_bytes).held_out.about(size.held_out)


class Teacher(Transformer):
    """A transformer of 3.0 million parameters."""

    def __init__(self, preprocessing: str = "") -> None:
        super().__init__(VOCABULARY, width=256, layers=3, heads=4, longest=LONGEST)
        self.preprocessing = preprocessing


def teacher(size: Size | None = None) -> Teacher:
    """The trained teacher in eval mode. The first call trains it (under a minute), later ones read its file.

    Its ``preprocessing`` names the tokenizer, which another Python's sources change.
    """
    size = size or FULL
    digest = read_corpus(size.text_bytes).tokenizer_digest
    key = hashlib.sha256(f"{digest} {size}".encode()).hexdigest()[:12]
    model = Teacher(f"byte-level BPE {digest}, each line by itself")
    model.load_state_dict(trained_once(f"language-teacher-{RECIPE}-{key}", lambda: _trained(size)))
    return model.eval()


def quick_teacher() -> Teacher:
    """One of the same size that was trained on less."""
    return teacher(QUICK)


def _trained(size: Size) -> Teacher:
    """A teacher trained with fixed seeds, one epoch; the caller's random numbers are left as they were."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        model = Teacher().train()
        batches = loader(read_corpus(size.text_bytes).train.about(size.trained), seed=0)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=len(batches))
        for batch in batches:
            loss = next_token_loss(forward(model, batch), batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model


def forward(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """(batch, length, classes) logits, unshifted: those at token i are of token i + 1."""
    logits: Tensor = model(batch["input_ids"], batch["attention_mask"])
    return logits


def next_labels(batch: dict[str, Any]) -> Tensor:
    """(batch, length) the label of each position's next token; the last token of an example has none."""
    labels: Tensor = batch["labels"]
    return F.pad(labels[:, 1:], (0, 1), value=NO_LABEL)


def next_token_loss(logits: Tensor, batch: dict[str, Any]) -> Tensor:
    """Mean cross-entropy with the next token, of all positions that have one."""
    return F.cross_entropy(logits.flatten(0, 1), next_labels(batch).flatten(), ignore_index=NO_LABEL)


def loader(data: Examples, seed: int) -> DataLoader[Any]:
    """Batches of mappings with ``id``, ``input_ids``, ``attention_mask`` and ``labels``, padded on the right."""
    order = SimilarLengths(data, torch.Generator().manual_seed(seed))
    return DataLoader(data, batch_sampler=order, collate_fn=collate)


class SimilarLengths(Sampler[list[int]]):
    """Batches, in random order, of examples about equally long: little padding. A seed gives the same each time."""

    def __init__(self, data: Examples, generator: torch.Generator) -> None:
        self.lengths = torch.tensor([len(example.tokens) for example in data.examples])
        self.generator = generator

    def __len__(self) -> int:
        return -(-len(self.lengths) // BATCH)

    def __iter__(self) -> Iterator[list[int]]:
        shuffled = torch.randperm(len(self.lengths), generator=self.generator)
        # A stable sort of what was shuffled: examples of one length meet others in each epoch.
        batches = shuffled[self.lengths[shuffled].argsort(stable=True)].split(BATCH)
        for number in torch.randperm(len(batches), generator=self.generator).tolist():
            yield batches[number].tolist()


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Examples as one batch, padded on the right to its longest."""

    def padded(sequences: list[Tensor], padding: int) -> Tensor:
        return pad_sequence(sequences, batch_first=True, padding_value=padding)

    tokens = [item["input_ids"] for item in items]
    return {
        "id": [item["id"] for item in items],
        "input_ids": padded(tokens, 0),
        "attention_mask": padded([torch.ones_like(one) for one in tokens], 0),
        "labels": padded([item["labels"] for item in items], NO_LABEL),
    }
