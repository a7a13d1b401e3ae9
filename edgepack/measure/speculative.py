"""How much sooner an artifact answers with a draft model beside it, and how many drafted tokens it accepts.

The draft length is chosen on some prompts and measured on others. Every prompt is answered without and with the draft
in turns, and then in the opposite order, so that a busy machine slows both; of the two times of an answer the shorter
counts, because a stall only ever adds. The speed-up is a ratio of sums over prompts, its interval a bootstrap over
prompts. Greedy; what Python adds to a token is in both times.

The output with a draft may differ from the artifact's own where the two likeliest tokens are so close that a pass over
several tokens rounds the other way: such answers are counted, with how close it was. Knows nothing of budgets.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepack.errors import InputRefused
from edgepack.figures import significant
from edgepack.measure import bootstrap
from edgepack.measure.draft_worth import Elsewhere
from edgepack.measure.drafted_answer import Answer, alone, together
from edgepack.measure.memory import rss_mb
from edgepack.text import read_text, windows
from edgepack.worker import Progress, no_progress

if TYPE_CHECKING:
    from edgepack.runtimes.llama_cpp import Model

SHOWN_DIFFERENCES = 10
# The text is cut before it is tokenized: no vocabulary needs more characters for a token of prose.
CHARACTERS_PER_TOKEN = 64


@dataclass(frozen=True)
class Pair:
    """The answers to one prompt without a draft and with it."""

    prompt: tuple[int, ...]
    alone: Answer
    together: Answer


def speculative(
    *,
    artifact: str,
    draft: str,
    text: str,
    lengths: Sequence[int],
    prompts: int,
    tuning_prompts: int,
    prompt_tokens: int,
    tokens: int,
    threads: int,
    gpu_layers: int,
    elsewhere: Mapping[str, Any] | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Measure a draft model.

    Args:
        artifact: GGUF that answers, or the first shard of a split one.
        draft: GGUF that proposes.
        text: UTF-8 text whose beginning the prompts are cut from.
        lengths: Draft lengths to choose from; a single one is taken as it is.
        prompts: Prompts to measure on.
        tuning_prompts: Prompts before them, to choose the length on.
        prompt_tokens: Tokens of a prompt.
        tokens: Tokens of an answer; at least 2.
        threads: CPU threads, of both.
        gpu_layers: Layers on the accelerator, of both; -1 moves all.
        elsewhere: Where this machine is not the target: the fields of `draft_worth.Elsewhere`, by which the length is
            chosen; None lets the time taken here decide.
        progress: In answers.

    Returns:
        `length`, `acceptance` and `speed_up` with their intervals, `tokens_per_pass`, the speeds, the costs the formula
        of `draft_worth` asks for, `identical` answers and the first `differences`, and every length tried.

    Raises:
        InputRefused: The two have different vocabularies, or the text is too short.
        StepError: llama.cpp can't load or run one of them, or can't take tokens back.
    """
    from edgepack.runtimes.llama_cpp import Model, bindings

    os.environ["GOMP_SPINCOUNT"] = "10000"  # as in latency.py: single tokens are short
    bindings()
    options: dict[str, Any] = {"threads": threads, "gpu_layers": gpu_layers, "context": prompt_tokens + tokens}
    tuned = tuning_prompts if len(lengths) > 1 else 0
    counted = _Counted(progress, 2 + 2 * (tuned * (1 + len(lengths)) + prompts * 2))
    with Model(artifact, **options) as target:
        cut = prompts_of(target, text, tuned + prompts, prompt_tokens)
        counted.after(alone(target, cut[0], tokens))
        before = rss_mb()
        with Model(draft, **options) as helper:
            refuse_other_vocabulary(target, helper)
            counted.after(together(target, helper, cut[0], tokens, max(lengths)))
            memory = rss_mb() - before
            models = (target, helper)
            tried = _tried([_turns(models, prompt, tokens, lengths, counted) for prompt in cut[:tuned]])
            length = _best(tried, Elsewhere(**elsewhere) if elsewhere else None) if tried else lengths[0]
            pairs = [_turns(models, prompt, tokens, (length,), counted)[length] for prompt in cut[tuned:]]
            differences = _differences(target, pairs)
    return summary(pairs, length) | {
        "identical": len(pairs) - len(differences),
        "differences": differences[:SHOWN_DIFFERENCES],
        "tried": tried,
        "draft_memory_mb": round(max(0.0, memory), 1),
        "settings": options | {"prompt_tokens": prompt_tokens, "tokens": tokens, "tuning_prompts": tuned},
    }


def prompts_of(model: Model, text: str, count: int, length: int) -> list[tuple[int, ...]]:
    """Consecutive pieces of a text, each `length` tokens, BOS first where the vocabulary adds one."""
    beginning = read_text(text)[: CHARACTERS_PER_TOKEN * count * length]
    first = [model.bos] if model.add_bos else []
    pieces = windows(
        model.tokenize(beginning, add_special=False, parse_special=False), length - len(first), limit=count
    )
    if len(pieces) < count:
        raise InputRefused(
            f"the text has {len(pieces)} pieces of {length} tokens, expected {count} prompts",
            hint="Give a longer text with --evaluation.",
        )
    return [tuple(first + piece) for piece in pieces]


def refuse_other_vocabulary(artifact: Model, draft: Model) -> None:
    """Token ids go from one model to the other: they must mean the same.

    Raises:
        InputRefused: With the first difference.
    """
    names = f"{draft.path.name} can't draft for {artifact.path.name}: "
    hint = "A draft has to be made from the same model, with the same tokens pruned."
    sizes = draft.vocab_size, artifact.vocab_size
    if sizes[0] != sizes[1]:
        raise InputRefused(f"{names}its vocabulary has {sizes[0]:,} tokens, expected {sizes[1]:,}", hint=hint)
    for name in ("bos", "eos", "add_bos"):
        if getattr(draft, name) != getattr(artifact, name):
            raise InputRefused(
                f"{names}{name} is {getattr(draft, name)}, expected {getattr(artifact, name)}", hint=hint
            )
    for token in range(artifact.vocab_size):
        pieces = draft.detokenize((token,)), artifact.detokenize((token,))
        if pieces[0] != pieces[1]:
            raise InputRefused(f"{names}token {token} is {pieces[0]!r}, expected {pieces[1]!r}", hint=hint)


@dataclass
class _Counted:
    """Progress in answers."""

    progress: Progress
    total: int
    done: int = 0

    def after(self, answer: Answer) -> Answer:
        self.done += 1
        self.progress(self.done, self.total)
        return answer


def _turns(
    models: tuple[Model, Model], prompt: Sequence[int], tokens: int, lengths: Sequence[int], count: _Counted
) -> dict[int, Pair]:
    """Answer a prompt without the draft and at every length, then in the opposite order; the faster answers."""
    artifact, draft = models
    found: dict[int, list[Answer]] = {length: [] for length in (0, *lengths)}
    for length in (*found, *reversed(found)):
        answer = together(artifact, draft, prompt, tokens, length) if length else alone(artifact, prompt, tokens)
        found[length].append(count.after(answer))
    fastest = {length: min(answers, key=lambda answer: answer.ms) for length, answers in found.items()}
    return {length: Pair(tuple(prompt), fastest[0], fastest[length]) for length in lengths}


def _tried(answered: Sequence[Mapping[int, Pair]]) -> list[dict[str, Any]]:
    """Every length over the same prompts."""
    return [summary([pairs[length] for pairs in answered], length) for length in (answered[0] if answered else ())]


def _best(tried: Sequence[Mapping[str, Any]], elsewhere: Elsewhere | None) -> int:
    """The length with the largest speed-up: by the clock, or by the formula for a machine that is not this one."""

    def gain(row: Mapping[str, Any]) -> float:
        if elsewhere is None:
            return float(row["speed_up"]["value"])
        predicted = elsewhere.speed_up(row, row["tokens_per_pass"])
        return float(row["tokens_per_pass"]) if predicted is None else predicted

    return int(max(tried, key=gain)["length"])


def summary(pairs: Sequence[Pair], length: int) -> dict[str, Any]:
    """What the answers to all prompts come to.

    Args:
        pairs: One a prompt.
        length: Draft length of all of them.
    """
    without = np.array([pair.alone.ms for pair in pairs])
    with_draft = np.array([pair.together.ms for pair in pairs])
    drafted = np.array([sum(pair.together.drafted) for pair in pairs], dtype=np.float64)
    accepted = np.array([sum(pair.together.accepted) for pair in pairs], dtype=np.float64)
    passes = sum(len(pair.together.drafted) for pair in pairs)
    passes_ms = sum(pair.together.passes_ms for pair in pairs)
    # The first token of an answer comes from the prompt, before the first pass.
    generated = sum(len(pair.together.ids) - 1 for pair in pairs)
    token_ms = without.sum() / generated
    pass_cost = passes_ms / passes / token_ms
    draft_tokens = drafted.sum() + passes * pass_cost  # and what it reads once more, in units of a token of its own
    return {
        "length": length,
        "n": len(pairs),
        "drafted": int(drafted.sum()),
        "acceptance": _estimate(bootstrap.ratio(accepted, np.maximum(drafted, 1))),
        "token_acceptance": _rounded(_token_acceptance(pairs)),
        "tokens_per_pass": _rounded(generated / passes),
        "speed_up": _estimate(bootstrap.ratio(without, with_draft)),
        "alone_tokens_per_s": _rounded(1000 / token_ms),
        "together_tokens_per_s": _rounded(1000 * generated / with_draft.sum()),
        "pass_cost": _rounded(pass_cost),
        "draft_cost": _rounded((with_draft.sum() - passes_ms) / draft_tokens / token_ms),
        "prompt_ms": _rounded(float(np.median([pair.alone.prompt_ms for pair in pairs]))),
        "prompt_with_draft_ms": _rounded(float(np.median([pair.together.prompt_ms for pair in pairs]))),
    }


def _token_acceptance(pairs: Sequence[Pair]) -> float:
    """Share of the drafted tokens that were accepted, of those whose predecessors all were.

    The `a` of the formula: what stands behind a rejected token was never judged.
    """
    judged = kept = 0
    for pair in pairs:
        answer = pair.together
        kept += sum(answer.accepted)
        judged += sum(k + (k < g) for k, g in zip(answer.accepted, answer.drafted, strict=True))
    return kept / max(1, judged)


def _differences(artifact: Model, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """The first place of each prompt where the draft changed the answer, and how close the two best tokens were."""
    found = []
    for number, pair in enumerate(pairs):
        one, other = pair.alone.ids, pair.together.ids
        place = next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
        if place is not None:
            margin = _margin(artifact, pair.prompt, one[:place])
            found.append({"prompt": number, "token": place, "ids": [one[place], other[place]], "margin": margin})
    return found


def _margin(artifact: Model, prompt: Sequence[int], ids: Sequence[int]) -> float:
    """Logarithm of the odds, in nats, of the likeliest next token against the second."""
    artifact.clear()
    artifact.feed(prompt, 0)
    for place, token in enumerate(ids, len(prompt)):
        logits = artifact.read((token,), place)[0]
    second, best = np.sort(logits)[-2:]
    return _rounded(float(best - second))


def _estimate(found: bootstrap.Estimate) -> dict[str, Any]:
    low, high = found.ci95 or (found.value, found.value)
    return {"value": _rounded(found.value), "ci95": [_rounded(low), _rounded(high)]}


def _rounded(value: float) -> float:
    return significant(value, 5)
