"""Whether a draft model makes the artifact faster, and how to run the two, for the card."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from edgepack.package.how_to_run import llama_cpp_options

_NOT_MEASURED = "not measured"


def speculation(recipe: Mapping[str, Any], artifact: str, runtime: Mapping[str, Any]) -> str:
    """The section as Markdown; empty where no draft was asked for.

    Args:
        recipe: Of the manifest: `draft`, as `edgepack.drafting` records it.
        artifact: Path of the model file in the package.
        runtime: `runtime.json`.
    """
    draft = recipe.get("draft")
    if not isinstance(draft, Mapping):
        return ""
    reason = str(draft["reason"])
    parts = ["## Speculative decoding", f"{reason[:1].upper()}{reason[1:]}. {_made(draft)}"]
    found = draft.get("measured")
    if found:
        parts += [_table(found), _notes(found)]
    if runtime.get("draft"):
        parts.append(f"```sh\n{command(artifact, runtime)}\n```")
    else:
        parts.append("No draft model is in this package.")
    return "\n\n".join(part for part in parts if part)


def command(artifact: str, runtime: Mapping[str, Any]) -> str:
    """Artifact and draft in llama.cpp (common/arg.cpp: `--spec-type`, `-md`, `--spec-draft-n-max`).

    `--draft-max` of older releases ends a newer llama.cpp with an error, and without `--spec-type` it drafts nothing.

    Args:
        artifact: Path of the model file in the package.
        runtime: `runtime.json`, with `draft`.
    """
    draft = runtime["draft"]
    layers = int(runtime.get("gpu_layers") or 0)
    offload = f" -ngld {layers if layers > 0 else 999}" if layers else ""
    return (
        f"llama-server -m {shlex.quote(artifact)}{llama_cpp_options(runtime)} \\\n"
        f"  -md {shlex.quote(draft['model'])}{offload} --spec-type {draft['type']} "
        f"--spec-draft-n-max {int(draft['length'])}"
    )


def _made(draft: Mapping[str, Any]) -> str:
    """How the draft was made, in a sentence."""
    kept, request = draft["prune"]["kept_layers"], draft["request"]
    healed = draft.get("heal")
    words = f"The draft is the source with {len(kept)} layers"
    if draft["prune"]["request"].get("ffn"):
        words += f" of {draft['prune']['request']['ffn']:,} neurons"
    words += f", healed on {healed['tokens']:,} tokens" if healed else ", not healed"
    size = f", {draft['bytes'] / 1e6:,.2f} MB" if "bytes" in draft else ""
    return f"{words}, {request['quantize']}{size}."


def _table(found: Mapping[str, Any]) -> str:
    """What was measured: the length that was chosen, and those it was chosen from."""
    rows = [(found, f"{found['n']} other prompts, the figures above")]
    rows += [(row, f"{row['n']} prompts to choose by") for row in found.get("tried", ())]
    lines = [
        "| drafted per pass | accepted | tokens per pass | speed-up | tokens/s without | with | on |",
        "|---:|---:|---:|---:|---:|---:|---|",
    ]
    return "\n".join(lines + [_row(row, where) for row, where in rows])


def _row(row: Mapping[str, Any], where: str) -> str:
    accepted = row["acceptance"]
    gain = row.get("speed_up")
    cells = [
        str(row["length"]),
        f"{100 * accepted['value']:.1f} % ({100 * accepted['ci95'][0]:.1f} to {100 * accepted['ci95'][1]:.1f})",
        f"{row['tokens_per_pass']:.2f}",
        f"{gain['value']:.2f} ({gain['ci95'][0]:.2f} to {gain['ci95'][1]:.2f})" if gain else _NOT_MEASURED,
        *(_speed(row.get(name)) for name in ("alone_tokens_per_s", "together_tokens_per_s")),
        where,
    ]
    return f"| {' | '.join(cells)} |"


def _speed(value: float | None) -> str:
    return _NOT_MEASURED if value is None else f"{value:,.4g}"


def _notes(found: Mapping[str, Any]) -> str:
    """What the numbers rest on, and whether the output stayed the same."""
    settings = found["settings"]
    words = [
        f"Greedy answers of {settings['tokens']} tokens to prompts of {settings['prompt_tokens']}, with and "
        "without the draft in turns; intervals are 95 %, over prompts."
    ]
    if found.get("speed_up"):
        words.append(
            f"A pass over the drafted tokens took {found['pass_cost']:.2f} times that over one token, a token in the "
            f"draft {found['draft_cost']:.2f} times one in the artifact."
        )
    words.append(_sameness(found["identical"], found["n"], found["differences"]))
    words.append(f"The draft takes {found['draft_memory_mb']:,.0f} MB of memory beside the artifact.")
    return " ".join(words)


def _sameness(identical: int, answers: int, differences: Sequence[Mapping[str, Any]]) -> str:
    if not differences:
        return f"All {answers} answers were the same tokens as without it."
    widest = max(difference["margin"] for difference in differences)
    return (
        f"{identical} of {answers} answers were the same tokens as without it; the others part where the two likeliest "
        f"tokens were within {widest:.2g} nats, which a pass over several tokens rounds otherwise than one over one."
    )
