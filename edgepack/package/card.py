"""README.md of a package: the verdict first, then the numbers, how to run it, and where it is from.

Made from the manifest and the measurements alone, so that it says nothing they do not; what was not measured says so.
Names come from strangers: they are escaped, so that a model can't write into its own card.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgepack.judgement import NEEDS_DEVICE
from edgepack.measurement import Measurement
from edgepack.package import onnx_run
from edgepack.package.allocation import allocation
from edgepack.package.candidates import candidates
from edgepack.package.choice import choice
from edgepack.package.how_to_run import sections
from edgepack.package.licences import one_line
from edgepack.package.markdown import escape
from edgepack.package.speculation import speculation
from edgepack.package.steps import steps
from edgepack.wording import ROWS, in_words, limits, measured

# Rows whose samples are those that the fidelity of a package rests on.
_FIDELITY = frozenset(
    ["mean_kld", "median_kld", "kld_p99", "cosine_mean", "cosine_p01", "label_agreement", "rank_agreement"]
)
# Shown even when nothing says anything of them: their absence is news.
_ALWAYS = ("decode_tokens_per_s_p50", "ttft_ms_p50", "peak_rss_mb")
_ALWAYS_EMBEDDING = ("latency_ms_p50", "peak_rss_mb")


@dataclass(frozen=True)
class Evidence:
    """What was found out about the artifact.

    Args:
        rows: Judged measurements.
        plan: The plan's JSON; `parameters` and `architecture` are shown where it has them.
        conformance: What the checks against the source found.
    """

    rows: tuple[Measurement, ...]
    plan: Mapping[str, Any]
    conformance: Mapping[str, Any]


def card(manifest: Mapping[str, Any], evidence: Evidence, runtime: Mapping[str, Any], licences: Sequence[str]) -> str:
    """The card as Markdown.

    Args:
        manifest: The manifest, digest of the artifact included; its file list is not needed.
        evidence: Measurements and checks.
        runtime: `runtime.json`.
        licences: Paths of the licence files in the package.
    """
    rows = evidence.rows
    runtime = dict(runtime) | {
        "chat": runtime.get("chat") or bool((evidence.conformance.get("chat") or {}).get("chats"))
    }
    name = f"{one_line(manifest['name'])} for {manifest['target_name']}"
    parts = [
        f"# {escape(name)}",
        verdict(manifest, rows),
        _summary(manifest, evidence.plan),
        table(rows, embedding=bool(runtime.get("embedding"))),
        _footnote(manifest, rows),
        steps(evidence.plan.get("waterfall") or (), manifest["recipe"]),
        _checks(evidence.conformance),
        "## Run it",
        _engine(runtime),
        *_run(manifest, runtime),
        speculation(manifest["recipe"], manifest["artifact"], runtime),
        "## Where it is from",
        _origin(manifest, licences),
        "## How it was made",
        _facts(_recipe(manifest["recipe"]) | {"toolchain": _toolchain(manifest["toolchain"])}),
        candidates(manifest["recipe"].get("search")),
        choice(manifest["recipe"].get("auto")),
        allocation(manifest["recipe"]),
        "## Check it",
        f"{_code('edgepack verify .')} checks every byte, {_code('sha256sum -c SHA256SUMS')} does so without edgepack, "
        f"{_code('edgepack validate .')} measures again on your machine. Every measurement is in "
        f"{_code('evidence/validation.json')}; {_code('evidence/report.html')} shows them as pictures. "
        "A rebuild from the same inputs, options and toolchain has the same "
        f"artifact digest:\n\n    {manifest['artifact_digest']}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def verdict(manifest: Mapping[str, Any], rows: Sequence[Measurement]) -> str:
    """The first lines: the verdict, and for anything but a plain pass, which budgets stand behind it."""
    target = _code(manifest["target_name"])
    gated = [row for row in rows if row.verdict]
    if manifest["verdict"] == "fail":
        missed = "; ".join(_missed(row) for row in gated if row.verdict == "fail")
        return f"**Verdict: fail.** Budgets of {target} that are missed: {missed}."
    if manifest["verdict"] == "incomplete":
        unmeasured = [row for row in gated if row.verdict == "not_measured"]
        away = [_label(row) for row in unmeasured if (row.note or NEEDS_DEVICE).startswith(NEEDS_DEVICE)]
        here = [_with_note(row) for row in unmeasured if _label(row) not in away]
        unsure = [_with_note(row) for row in gated if row.verdict == "inconclusive"]
        words = ["**Verdict: incomplete.** No budget is missed, but not all could be decided."]
        if away:
            how = _code("edgepack validate . --device ssh://user@device")
            words.append(f"Not measured on a {target}: {_list(away)}.")
            words.append(f"Measure there, where edgepack is installed, with {how}.")
        if here:
            words.append(f"Not measured: {_list(here)}.")
        if unsure:
            words.append(f"Inconclusive: {_list(unsure)}.")
        met = sum(row.verdict == "pass" for row in gated)
        return " ".join([*words, f"Measured and met: {met} of {len(gated)} budgets."])
    if not gated:
        return f"**Verdict: pass.** The profile {target} sets no budgets."
    return f"**Verdict: pass.** Every budget of {target} was measured and met ({len(gated)} of {len(gated)})."


def _with_note(row: Measurement) -> str:
    return f"{_label(row)} ({escape(row.note)})" if row.note else _label(row)


def _missed(row: Measurement) -> str:
    return f"{_label(row)} is {_said(row, measured(row))}, allowed is {_said(row, limits(row))}"


def _list(labels: Sequence[str]) -> str:
    """Labels have commas of their own."""
    return "; ".join(label if label[1:2].isupper() else label[:1].lower() + label[1:] for label in labels)


def table(rows: Sequence[Measurement], *, embedding: bool = False) -> str:
    """Measured beside predicted beside allowed, in the order a person asks."""
    by_name = {row.name: row for row in rows}
    always = _ALWAYS_EMBEDDING if embedding else _ALWAYS
    known = [name for name in ROWS if name in by_name or name in always]
    names = [*known, *(name for name in by_name if name not in ROWS)]
    lines = ["| | measured | predicted | budget | verdict |", "|---|---:|---:|---:|---|"]
    for name in names:
        row = by_name.get(name) or Measurement(name, None, "", measured_on=None)
        value = _said(row, measured(row)) + (_change(by_name) if name == "perplexity" else "")
        predicted = "" if row.predicted is None else _said(row, in_words(row, row.predicted))
        words = (row.verdict or "").replace("_", " ")
        lines.append(f"| {_label(row)} | {value} | {predicted} | {_said(row, limits(row))} | {words} |")
    return "\n".join(lines)


def _change(by_name: Mapping[str, Measurement]) -> str:
    """How much the perplexity grew, where both were measured."""
    before, after = by_name.get("source_perplexity"), by_name["perplexity"]
    if before is None or not before.value or after.value is None:
        return ""
    return f" ({100 * (after.value / before.value - 1):+.2f} %)"


def _label(row: Measurement) -> str:
    return ROWS[row.name][0] if row.name in ROWS else escape(row.name)


def _said(row: Measurement, text: str) -> str:
    """A value in words; the unit of a measurement that edgepack does not know may be anything."""
    return text if row.name in ROWS else escape(text)


def _summary(manifest: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    quantize = manifest["recipe"].get("quantize")
    words = [f"{_code(manifest['artifact'])}"]
    if quantize:
        words.append(f"quantized to {escape(quantize)}")
    if isinstance(plan.get("parameters"), int):
        words.append(f"{plan['parameters'] / 1e6:,.1f} million parameters")
    if plan.get("architecture"):
        words.append(f"architecture {escape(plan['architecture'])}")
    return ", ".join(words) + "."


# What a person wants to know of the machine; all of it is in validation.json.
_MACHINE = {"cpu": "", "cores": "cores", "gpu": "GPU", "ram_mb": "memory in MB", "system": "", "arch": ""}


def _footnote(manifest: Mapping[str, Any], rows: Sequence[Measurement]) -> str:
    """What the numbers rest on: samples, machine."""
    samples = sorted({row.n for row in rows if row.n and row.name in _FIDELITY})
    words = ["± is half of the 95 % confidence interval; predicted values were computed before the build."]
    if samples:
        words.append(f"Fidelity rests on {samples[-1]:,} scored samples.")
    facts = manifest["measured_on"]
    machine = ", ".join(f"{words} {_short(facts[key])}".strip() for key, words in _MACHINE.items() if facts.get(key))
    if any(row.value is not None for row in rows) and machine:
        words.append(f"Measured on the machine of the build: {machine}.")
    return " ".join(words)


def _checks(found: Mapping[str, Any]) -> str:
    """What was compared with the source before anything was packaged, one line a check."""
    lines = []
    for name, words in _CHECKS.items():
        result = found.get(name)
        if not isinstance(result, Mapping):
            continue
        line = escape(result["note"]) if result.get("note") else words(result)
        lines.append(f"- {_TITLES[name]}: {line}")
        lines += [f"  - {_short(difference)}" for difference in result.get("differences") or []]
    return "\n".join(["## Checked against the source", "", *lines]) if lines else ""


def _tokens(result: Mapping[str, Any]) -> str:
    return f"the same ids on {result['texts']:,} texts" + (
        f", {result['tokens']:,} tokens" if "tokens" in result else ""
    )


def _chats(result: Mapping[str, Any]) -> str:
    return f"the same ids for {result['chats']} chats" if result.get("chats") else _short(result)


def _logits(result: Mapping[str, Any]) -> str:
    if "mean_kld" not in result:
        return _short(result)
    return (
        f"mean KL divergence {result['mean_kld']:.2g}, largest difference of a log-probability "
        f"{result['max_abs_dlogp']:.2g}, over {result['positions']:,} positions"
    )


_TITLES: Mapping[str, str] = {
    "tokens": "Token ids, this package against the source's tokenizer",
    "chat": "Chat template, this package against the source's",
    "logits": "Logits, the full-precision reference against transformers",
    "reference": "Reference of the fidelity rows",
}
_CHECKS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "tokens": _tokens,
    "chat": _chats,
    "logits": _logits,
    "reference": lambda result: f"{_short(result.get('type'))}, read by {_short(result.get('read_by'))}",
}


_OWN_SECTION = ("search", "prune", "heal", "auto", "draft")  # of the recipe: shown elsewhere on the card


def _recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The options, and how many tensors have which type instead of the list of all of them."""
    shown = {key: value for key, value in recipe.items() if value not in (None, False) and key not in _OWN_SECTION}
    types = recipe.get("types")
    if isinstance(types, Mapping):
        counts = Counter(str(value) for value in types.values())
        shown["types"] = ", ".join(f"{count} x {name}" for name, count in sorted(counts.items()))
    return shown


def _toolchain(versions: Mapping[str, Any]) -> dict[str, Any]:
    """Versions by name; what is nested (builds, digests of libraries) stays in the manifest."""
    return {key: value for key, value in versions.items() if value and not isinstance(value, Mapping)}


def _engine(runtime: Mapping[str, Any]) -> str:
    """What runs the package, in one paragraph."""
    engine, oldest = runtime.get("engine", "llama.cpp"), escape(runtime.get("min_version", "not stated"))
    if engine == "llama.cpp":
        return f"Commands start in this folder. Oldest llama.cpp: {oldest}."
    words = [f"Python starts in this folder. Oldest {escape(engine)}: {oldest}."]
    if runtime.get("provider"):
        words.append(f"Execution provider: {_code(str(runtime['provider']))}.")
    if engine == "onnxruntime":
        words.append(f"What stands in the code (lengths, special tokens, sizes) is in {_code('runtime.json')} too.")
    return " ".join(words)


def _run(manifest: Mapping[str, Any], runtime: Mapping[str, Any]) -> list[str]:
    name = f"{manifest['name']}-{manifest['target_name']}"
    made = sections if manifest["artifact"].endswith(".gguf") else onnx_run.sections
    return [
        f"**{title}**\n\n```{language}\n{code}\n```"
        for title, language, code in made(name, manifest["artifact"], runtime)
    ]


def _origin(manifest: Mapping[str, Any], licences: Sequence[str]) -> str:
    source = manifest["source"]
    licence = source.get("licence")
    facts = {
        "model": source.get("id") or source.get("name"),
        "revision": source.get("revision"),
        "commit": source.get("commit"),
        "licence": licence or "unknown: the source states none; ask its authors before you pass the model on",
        "gated": source.get("gated") or None,
    }
    files = ", ".join(_code(path) for path in licences)
    return (
        _facts(facts) + f"\n\nLicence texts: {files}. The sha256 of every source file is in {_code('edgepack.json')}."
    )


def _facts(facts: Mapping[str, Any]) -> str:
    lines = [
        f"| {escape(key.replace('_', ' '))} | {_short(value)} |"
        for key, value in facts.items()
        if value not in (None, "", {}, [])
    ]
    return "\n".join(["| | |", "|---|---|", *lines])


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{escape(key)} {_short(value[key])}" for key in sorted(value))[:400]
    if isinstance(value, (list, tuple)):
        return ", ".join(_short(item) for item in value)[:400]
    return escape(value)


def _code(text: str) -> str:
    """A code span whose content can't end it."""
    flat = one_line(text)
    fence = "`" * (max((len(run) for run in re.findall("`+", flat)), default=0) + 1)
    pad = " " if flat.startswith("`") or flat.endswith("`") else ""
    return f"{fence}{pad}{flat}{pad}{fence}"
