"""How an ONNX package is run: snippets for Python, Android and iOS with its own names, sizes and special tokens.

The code is data (`_data/snippets.toml`): one text for each language and kind of model, one ending for each task. What
is filled in comes from `runtime.json`; words of the model's authors go in as literals of the language.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from importlib import resources
from string import Template
from typing import Any

# Providers that are on a device and not where Python runs; the packages of Maven Central that have them.
_ANDROID: Mapping[str, tuple[str, str]] = {
    "QNNExecutionProvider": (
        "onnxruntime-android-qnn",
        '; addQnn(mapOf("backend_path" to "libQnnHtp.so"))',
    )
}
_QUESTION, _SENTENCE = "How do I reset my password?", "The new phone arrived in Berlin on Monday."
_PASSAGE = "To reset it, open Settings, choose Account and press Reset password."
_LENGTH = 256  # tokens of prompt and answer in a decoder's snippet


def sections(name: str, artifact: str, runtime: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Title, language of the code block, and code for every language the package is run from.

    Args:
        name: The package's folder on a device.
        artifact: Path of the model file in the package.
        runtime: `runtime.json`.
    """
    texts = _texts()
    kind, ending = _kind(runtime)
    # Where nothing says what the graph is for, no code could be right.
    if kind not in texts or ending not in texts[kind]["endings"]:
        return []
    found = []
    for language, about in texts["languages"].items():
        values = _values(language, name, artifact, runtime)
        if language == "swift" and runtime.get("provider") in _ANDROID:
            continue
        if language != "python" and values["rows"] > 1:  # their code gives one row
            continue
        tail = texts[kind]["endings"][ending].get(language, "").strip()
        values["ending"] = Template(tail).substitute(values)
        code = Template(texts[kind][language]).substitute(values).strip()
        found.append((about["title"], about["fence"], code))
    return found


@functools.cache
def _texts() -> dict[str, Any]:
    return tomllib.loads(resources.files("edgepack").joinpath("_data/snippets.toml").read_text(encoding="utf-8"))


def _kind(runtime: Mapping[str, Any]) -> tuple[str, str]:
    if runtime.get("engine") == "onnxruntime-genai":
        return "decoder", "chat" if runtime.get("chat") else "text"
    task = str(runtime.get("task"))
    outputs = runtime.get("outputs") or [{}]
    if task == "text-classification" and (outputs[0].get("shape") or [None])[-1] == 1:
        task = "reranking"
    return ("image" if "image" in runtime else "text"), task


def _values(language: str, name: str, artifact: str, runtime: Mapping[str, Any]) -> dict[str, Any]:
    provider = str(runtime.get("provider") or "CPUExecutionProvider")
    package, option = _ANDROID.get(provider, ("onnxruntime-android", ""))
    values: dict[str, Any] = {
        "model": artifact,
        "model_folder": artifact.rpartition("/")[0],
        "folder": "".join(c if c.isalnum() or c in "._-" else "-" for c in name),
        "threads": int(runtime.get("threads") or 0),
        "python_provider": "CPUExecutionProvider" if provider in _ANDROID else provider,
        "android_package": package,
        "kotlin_provider": option,
        "rows": 1,
    }
    if runtime.get("engine") == "onnxruntime-genai":
        return values | _decoder(language, runtime)
    return values | (
        _image(language, runtime["image"]) if "image" in runtime else _text(language, runtime.get("text") or {})
    )


def _text(language: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    special = settings.get("special_tokens") or {}
    padded = settings.get("padded_to")
    lower = bool(settings.get("lower_case"))
    mask = str(settings.get("mask_token") or "")
    before, between = special.get("before", []), special.get("between", [])
    return {
        "max_tokens": int(settings.get("max_tokens") or 512),
        "rows": int(settings.get("rows") or 1),
        "before": before or "[Int]()",
        "between": between or "[Int]()",
        "after": special.get("after") or "[Int]()",
        "context_start": len(before) + len(between),
        "second_type": int(bool(special.get("types"))),
        "python_padding": f"tokenizer.enable_padding(length={padded}, pad_id={settings.get('pad_id', 0)})"
        if padded
        else "tokenizer.no_padding()",
        "swift_padding": _swift_padding(padded, int(settings.get("pad_id") or 0)),
        "kotlin_padding": ".optPadToMaxLength()" if padded else ".optPadding(false)",
        "python_lower": ".lower()" if lower else "",
        "kotlin_lower": ".lowercase()" if lower else "",
        "swift_lower": ".lowercased()" if lower else "",
        "question": literal(str(settings.get("prompt") or "") + _QUESTION, language),
        "sentence": literal(_SENTENCE, language),
        "passage": literal(_PASSAGE, language),
        "masked": literal(f"The new phone arrived in {mask} on Monday.", language),
        "mask_id": settings.get("mask_id"),
    }


def _swift_padding(padded: int | None, pad_id: int) -> str:
    lines = ["let mask = [Int](repeating: 1, count: ids.count)"]
    if padded:
        lines = [
            "var mask = [Int](repeating: 1, count: ids.count)",
            f"let missing = {padded} - ids.count  // the graph takes exactly {padded} tokens",
            f"ids += [Int](repeating: {pad_id}, count: missing)",
            "types += [Int](repeating: 0, count: missing)",
            "mask += [Int](repeating: 0, count: missing)",
        ]
    return "\n".join(f"    {line}" for line in lines)


def _image(language: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    height, width, edge = int(settings["height"]), int(settings["width"]), int(settings.get("shortest_edge") or 0)
    mean, std = (list(map(float, settings[key])) for key in ("mean", "std"))
    scale, suffix = float(settings["scale"]), "f" if language == "kotlin" else ""
    size = f"(round(side * {edge} / min(image.size)) for side in image.size)" if edge else f"{width}, {height}"
    return {
        "height": height,
        "width": width,
        "edge": edge,
        "python_size": size,
        "resample": str(settings["resample"]).upper(),
        "scale": repr(scale),
        "scale_float": f"{scale!r}f",
        "mean": mean,
        "std": std,
        "mean_list": ", ".join(f"{value!r}{suffix}" for value in mean),
        "std_list": ", ".join(f"{value!r}{suffix}" for value in std),
    }


def _decoder(language: str, runtime: Mapping[str, Any]) -> dict[str, Any]:
    context = int(runtime.get("context") or _LENGTH)
    note = "  // a chat: put the prompt into the template in chat_template.jinja" if runtime.get("chat") else ""
    return {
        "max_length": min(_LENGTH, context),
        "prompt": literal("Once upon a time", language),
        "chat_note": note,
        "genai": str(runtime.get("min_version") or "<version>"),
    }


def literal(text: str, language: str) -> str:
    """A text as a string literal of a language: nothing in it ends the literal, the line or the code block."""
    plain = "".join(c if c.isprintable() else " " for c in text).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{plain.replace("$", chr(92) + "$") if language == "kotlin" else plain}"'
