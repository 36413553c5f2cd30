"""The standard library's text as tokens: a tokenizer trained there and then, and examples of varying length.

An example is a definition or a part of it, a run of whole lines; its id says where it stands, as
``json/decoder.py:120``. Knows nothing of models.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch.utils.data import Dataset

from logitcache.server.demo.sources import Source, standard_library

VOCABULARY = 2048
SHORTEST, LONGEST = 16, 256
"""Tokens of an example."""

HELD_OUT = 10
"""One file in so many is held out."""


@dataclass(frozen=True)
class Example:
    """A run of lines: where it stands, and its tokens."""

    id: str
    tokens: list[int]


class Examples(Dataset[dict[str, Any]]):
    """Examples as mappings with ``id``, ``input_ids`` and ``labels``, which are the ids again, unshifted."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.examples[index]
        tokens = torch.tensor(example.tokens)
        return {"id": example.id, "input_ids": tokens, "labels": tokens}

    @property
    def tokens(self) -> int:
        """Tokens of all examples."""
        return sum(len(example.tokens) for example in self.examples)

    def about(self, tokens: int) -> "Examples":
        """Every n-th example, so that there are about so many tokens; all, where there are no more."""
        return Examples(self.examples[:: max(1, round(self.tokens / tokens))])


@dataclass(frozen=True)
class Corpus:
    """The tokenizer, and the examples of the files that are trained on and of those that are held out."""

    tokenizer: Tokenizer
    train: Examples
    held_out: Examples

    @property
    def tokenizer_digest(self) -> str:
        """``sha256:…`` of the tokenizer as JSON: it differs where Python's sources do."""
        return f"sha256:{hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()}"


@lru_cache(maxsize=2)
def read_corpus(text_bytes: int) -> Corpus:
    """Read about so much text, train the tokenizer on what is not held out, and tokenize all: some seconds.

    Raises:
        DatasetFault: the running Python has no sources.
    """
    sources = standard_library(text_bytes)
    trained = [source for number, source in enumerate(sources) if number % HELD_OUT]
    tokenizer = train_tokenizer(trained)
    train = [example for source in trained for example in examples_of(source, tokenizer)]
    held_out = [example for source in sources[::HELD_OUT] for example in examples_of(source, tokenizer)]
    return Corpus(tokenizer, Examples(train), Examples(held_out))


def train_tokenizer(sources: Sequence[Source]) -> Tokenizer:
    """A byte-level BPE of `VOCABULARY` tokens, trained on lines; the same text gives the same tokenizer."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=sorted(ByteLevel.alphabet()), show_progress=False)
    tokenizer.train_from_iterator((list(source.lines) for source in sources), trainer)
    return tokenizer


def examples_of(source: Source, tokenizer: Tokenizer) -> Iterator[Example]:
    """Each definition of a file in runs of whole lines of at most `LONGEST` tokens; what is too short is left out.

    Lines are tokenized one by one, so that no token goes over the end of a line and every run begins where its id says.
    """
    lines = [encoding.ids for encoding in tokenizer.encode_batch(list(source.lines))]
    for definition in source.definitions():
        for run in _runs(definition, [len(line) for line in lines]):
            tokens = [token for line in run for token in lines[line]]
            if SHORTEST <= len(tokens) <= LONGEST:
                yield Example(f"{source.path}:{run.start + 1}", tokens)


def _runs(definition: range, lengths: Sequence[int]) -> Iterator[range]:
    """A definition's lines in runs that are as long as they may be; a line that is too long is a run of its own."""
    start, tokens = definition.start, 0
    for line in definition:
        if line > start and tokens + lengths[line] > LONGEST:
            yield range(start, line)
            start, tokens = line, 0
        tokens += lengths[line]
    yield range(start, definition.stop)
