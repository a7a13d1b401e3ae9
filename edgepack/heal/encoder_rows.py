"""Text an encoder is healed on: rows of tokens as its users give them, cut at other places in every pass.

The first pass reads the sentences of the text one by one. Later ones join up to `MOST_JOINED` of them, neighbours or
from anywhere, join halves of two, leave out words at one end of most rows, and replace some tokens of every other row
by random ones, so that a short text passed twenty times is never the same text twice: learning it by heart is what ends
a healing (docs/healing.md), and the teacher has an answer to any text (data augmentation in distillation: TinyBERT,
Jiao et al., arXiv:1909.10351). What a row is, depends on the task:

    vectors, labels of tokens          a text
    labels of texts                    a text, or two neighbours as a pair
    one score (rerankers)              a sentence and what follows it, or a passage from elsewhere
    question answering                 a sentence and what follows it
    masked words                       a text with `MASKED` of its tokens hidden

Held-out rows are single sentences from a few places spread over the text; no training row is made of a sentence that
shares a run of `SHARED_WORDS` words with one of them. Knows nothing of models beyond the tokenizer and the task.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from edgepack.checkpoint import Checkpoint
from edgepack.errors import InputRefused
from edgepack.heal.encoder_model import Batch
from edgepack.measure.encoder_samples import mask_token, read_tokenizer
from edgepack.text import sentences

LONGEST = 128  # tokens of a row: the sentences of ordinary text have 8 to 120
MOST_PASSES = 32  # that are cut anew; rows of more are seen again
MOST_JOINED = 4
MASKED = 0.15  # Devlin et al., arXiv:1810.04805, section 3.1
SHARED_WORDS = 13  # as in edgepack/calibrate/overlap.py
MOST_HELD_OUT, LEAST_HELD_OUT = 256, 4
LEAST_SENTENCES = 16
_RUNS = 4  # places that held-out sentences come from
_JOINED = (0.6, 0.2, 0.1, 0.1)  # share of rows with one sentence, two, three, four
_SHORTENED, _LEAST_WORDS = 0.9, 7  # share of rows that lose up to a third of their words, if they have so many
_MIXED = 0.3  # share of rows whose parts are from several places of the text
_REPLACED, _MOST_REPLACED = 0.5, 0.3  # share of rows with replaced tokens, and the largest share of those in a row
_UNUSED = re.compile(r"\[unused\d+\]")  # places that BERT's vocabulary keeps free
_SEED = 20260303
_TYPE = 1 << 32  # above every token id
PADDING = -1


@dataclass(frozen=True)
class Rows:
    """Packed rows `[rows, tokens]` each, see `pack`.

    Args:
        training: To train on.
        held_out: To judge by.
        passes: Over the text that `training` is made of.
        left_out: Sentences that belong to neither because they share words with held-out ones.
    """

    training: torch.Tensor
    held_out: torch.Tensor
    passes: int
    left_out: int


def encoder_rows(
    checkpoint: Checkpoint, text: str, task: str, tokens: int, *, pairs: bool = False, longest: int = LONGEST
) -> Rows:
    """Rows for a run of so many tokens.

    Args:
        checkpoint: Whose tokenizer.json.
        text: To train on.
        task: Name of the task, `edgepack/onnx/tasks.py`.
        tokens: To train on; as many passes are cut as that takes, at least one, at most `MOST_PASSES`.
        pairs: The model scores pairs of texts.
        longest: Most tokens of a row.

    Raises:
        InputRefused: Too few sentences, no tokenizer.json, or no mask token for masked words.
    """
    cutter = _Cutter(checkpoint, task, pairs, longest)
    training, held_out, left_out = split(_sentences(text))
    rows: list[list[int]] = []
    number = have = 0
    while have < tokens and number < MOST_PASSES:
        new = cutter.rows(training, number)
        rows += new
        have += sum(map(len, new))
        number += 1
    return Rows(pack(rows), pack(cutter.rows(held_out, 0)), number, left_out)


def split(found: Sequence[str]) -> tuple[list[str], list[str], int]:
    """Sentences to train on, sentences to judge by, and how many are neither.

    Raises:
        InputRefused: All of them share words with held-out ones.
    """
    count = max(LEAST_HELD_OUT, min(MOST_HELD_OUT, len(found) // 10))
    held: set[int] = set()
    for run in range(_RUNS):
        length = count * (run + 1) // _RUNS - count * run // _RUNS
        start = len(found) * (2 * run + 1) // (2 * _RUNS) - length // 2
        held |= set(range(max(0, start), max(0, start) + length))
    known = {words for place in held for words in _word_runs(found[place])}
    rest = [sentence for place, sentence in enumerate(found) if place not in held]
    training = [sentence for sentence in rest if known.isdisjoint(_word_runs(sentence))]
    if not training:
        raise InputRefused(
            "the training text repeats itself: every sentence shares words with one that is held out",
            hint="Give another text with --data.",
        )
    return training, [found[place] for place in sorted(held)], len(rest) - len(training)


def _sentences(text: str) -> list[str]:
    try:
        found = sentences(text, len(text))
    except InputRefused:
        found = []
    if len(found) < LEAST_SENTENCES:
        raise InputRefused(
            f"the training text has {len(found)} sentences of 20 to 400 characters, expected at least "
            f"{LEAST_SENTENCES}",
            hint="Give a longer text with --data.",
        )
    return found


def _word_runs(sentence: str) -> Iterator[tuple[str, ...]]:
    words = sentence.casefold().split()
    length = min(SHARED_WORDS, len(words))
    return (tuple(words[start : start + length]) for start in range(len(words) - length + 1))


def _joined(found: Sequence[str], generator: random.Random, *, alone: bool) -> Iterator[list[str]]:
    """Parts of every row of one pass."""
    start = 0
    while start < len(found):
        count = 1 if alone else generator.choices(range(1, MOST_JOINED + 1), _JOINED)[0]
        parts = list(found[start : start + count])
        start += count
        if not alone and generator.random() < _MIXED:
            others = [generator.choice(found) for _ in parts]
            parts = [parts[0], *others[1:]] if len(parts) > 1 else [_halves(parts[0], others[0])]
        if not alone and generator.random() < _SHORTENED:
            end = generator.choice((0, -1))
            parts[end] = _shortened(parts[end], generator, front=end == 0)
        yield parts


def _halves(first: str, second: str) -> str:
    """The beginning of one sentence and the end of another."""
    words, more = first.split(), second.split()
    return " ".join(words[: len(words) // 2] + more[len(more) // 2 :])


def _shortened(sentence: str, generator: random.Random, *, front: bool) -> str:
    words = sentence.split()
    if len(words) < _LEAST_WORDS:
        return sentence
    less = generator.randint(1, len(words) // 3)
    return " ".join(words[less:] if front else words[: len(words) - less])


class _Cutter:
    """Makes rows of sentences."""

    def __init__(self, checkpoint: Checkpoint, task: str, pairs: bool, longest: int) -> None:
        path = checkpoint.path / "tokenizer.json"
        self._engine, self._task = read_tokenizer(path), task
        self._engine.enable_truncation(longest)
        self._pairs = pairs or task == "question-answering"
        self._mask = int(self._engine.token_to_id(mask_token(path))) if task == "fill-mask" else None
        special = {token.content for token in self._engine.get_added_tokens_decoder().values()}
        known = self._engine.get_vocab(with_added_tokens=False).items()
        self._ordinary = sorted(number for token, number in known if token not in special and not _UNUSED.match(token))

    def rows(self, found: Sequence[str], number: int) -> list[list[int]]:
        """The rows of one pass, as `pack` takes them."""
        generator = random.Random(_SEED + number)
        rows = []
        for parts in _joined(found, generator, alone=number == 0 and not self._pairs):
            encoding = self._engine.encode(*self._sides(parts, found, generator))
            ids = list(encoding.ids)
            own = [place for place, special in enumerate(encoding.special_tokens_mask) if not special]
            if number > 0:
                self._replace(ids, own, generator)
            self._hide(ids, own, generator)
            rows.append([token + _TYPE * kind for token, kind in zip(ids, encoding.type_ids, strict=True)])
        return rows

    def _sides(self, parts: Sequence[str], found: Sequence[str], generator: random.Random) -> tuple[str, ...]:
        """A text, or two."""
        first, rest = parts[0], parts[1:]
        if self._pairs:
            return first, " ".join(rest or [generator.choice(found)])
        if self._task == "text-classification" and len(rest) == 1:
            return first, rest[0]
        return (" ".join(parts),)

    def _replace(self, ids: list[int], own: Sequence[int], generator: random.Random) -> None:
        """Put random tokens in some of the places of every other row."""
        if generator.random() >= _REPLACED:
            return
        share = _MOST_REPLACED * generator.random()
        for place in own:
            if generator.random() < share:
                ids[place] = generator.choice(self._ordinary)

    def _hide(self, ids: list[int], own: Sequence[int], generator: random.Random) -> None:
        """Mask some of the places if that is the task."""
        if self._mask is not None and own:
            for place in generator.sample(own, max(1, round(MASKED * len(own)))):
                ids[place] = self._mask


def pack(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Rows as one tensor `[rows, tokens of the longest]`: id + 2^32 x type, `PADDING` where a row has ended."""
    found = torch.full((len(rows), max(map(len, rows))), PADDING, dtype=torch.long)
    for place, row in enumerate(rows):
        found[place, : len(row)] = torch.tensor(row)
    return found


def unpack(rows: torch.Tensor, *, padding: int, types: bool) -> Batch:
    """Inputs of transformers, without columns that are padding in every row.

    Args:
        rows: From `pack`.
        padding: The model's padding token.
        types: The model takes token types.
    """
    real = rows >= 0
    longest = int(real.sum(dim=1).max())
    rows, real = rows[:, :longest], real[:, :longest]
    batch: dict[str, Any] = {
        "input_ids": torch.where(real, rows % _TYPE, padding),
        "attention_mask": real.long(),
    }
    return batch | ({"token_type_ids": torch.where(real, rows // _TYPE, 0)} if types else {})
