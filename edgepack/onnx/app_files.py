"""What an app needs beside the graph: which files of the source, and `runtime.json` with what they say put plainly.

Reads JSON of the source folder, which the checkpoint linter has passed; runs nothing of it. Special tokens are those of
tokenizer.json's post-processor (tokenizers 0.23: TemplateProcessing, BertProcessing, RobertaProcessing), because the
tokenizer libraries of phones encode one text and not always two. Image settings are those of transformers' image
processors (image_processing_utils.py, ConvNextImageProcessor for `crop_pct`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgepack.errors import InputRefused
from edgepack.onnx.providers import PROVIDER_OPTIONS
from edgepack.onnx.recipes import recipe_named

if TYPE_CHECKING:
    from edgepack.checkpoint import Checkpoint
    from edgepack.targets import Target
    from edgepack.workshop import Exported

TOKENIZER, PREPROCESSOR = "tokenizer.json", "preprocessor_config.json"
# PIL's numbers of resampling filters, as preprocessor_config.json has them.
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
# Oldest onnxruntime that runs the graphs of every recipe with the outputs of 1.31, tried with the wheels 1.19.2, 1.22.1
# and 1.24.2 (Linux x86-64): 8-bit MatMulNBits is not in the first. iOS has 1.24.2 (Swift package, 2026-09).
OLDEST, OLDEST_BLOCKS = "1.19", "1.22"
_FULL = 224  # ConvNeXt: below 384 pixels images are enlarged by 1 / crop_pct and cropped; 224 / 256 is its default


def require_files(checkpoint: Checkpoint, kind: str) -> None:
    """See that the source has what an app needs to make the graph's input.

    Args:
        checkpoint: The source.
        kind: `text` or `image`.

    Raises:
        InputRefused: tokenizer.json or preprocessor_config.json is missing.
    """
    wanted = PREPROCESSOR if kind == "image" else TOKENIZER
    if (checkpoint.path / wanted).is_file():
        return
    if kind == "image":
        hint = "It belongs beside config.json: the size, mean and deviation that images are brought to stand in it."
    else:
        others = [name for name in ("tokenizer.model", "spiece.model", "vocab.txt", "vocab.json", "merges.txt")
                  if (checkpoint.path / name).is_file()]  # fmt: skip
        found = f" from {', '.join(others)}" if others else ""
        hint = f"AutoTokenizer.from_pretrained(folder).save_pretrained(folder) of transformers writes it{found}."
    raise InputRefused(f"{checkpoint.path}: {wanted} is missing, and without it an app can't use the model", hint=hint)


def runtime(checkpoint: Checkpoint, target: Target, exported: Exported) -> dict[str, Any]:
    """What `runtime.json` says of an encoder beyond its engine.

    Returns:
        `min_version`, `task`, `inputs` and `outputs` (name, shape, dtype), `session` (options of onnxruntime),
        `provider_options`; for texts `text` (longest input, padding, special tokens, lower case, prompts), for images
        `image` (size, crop, scale, mean, deviation), for classifiers `labels`.
    """
    report = exported.report
    blocks = recipe_named(str(report.get("recipe", "fp32"))).method == "blocks"
    found: dict[str, Any] = {
        "min_version": OLDEST_BLOCKS if blocks else OLDEST,
        "task": report["task"],
        "inputs": report["inputs"],
        "outputs": report["outputs"],
        "session": {
            "intra_op_num_threads": target.runtime.threads,
            "inter_op_num_threads": 1,
            "execution_mode": "sequential",
            "graph_optimization_level": "all",
        },
        "provider_options": dict(PROVIDER_OPTIONS.get(target.onnx.provider, {})),
    }
    if report.get("labels"):
        found["labels"] = "tokenizer/labels.json"
    if report.get("image"):
        return found | {"image": image_settings(checkpoint, report["image"])}
    return found | {"text": text_settings(checkpoint, target, report)}


def text_settings(checkpoint: Checkpoint, target: Target, report: Mapping[str, Any]) -> dict[str, Any]:
    """What happens to a text before the graph.

    Returns:
        `max_tokens`; `padded_to` (fixed shapes only: every input has exactly so many); `rows` (fixed batch only);
        `pad_id`; `special_tokens` (ids `before`, `between`, `after`, and whether a second text has type 1);
        `mask_id` (fill-mask only); `lower_case`, `prompt` (put before a text), `prompts` (all of them).
    """
    tokenizer = checkpoint.json(TOKENIZER) or {}
    sentence = report.get("sentence") or {}
    longest = (checkpoint.json("tokenizer_config.json") or {}).get("model_max_length")  # 10^30 where it has no limit
    limits = [sentence.get("max_sequence_length"), report.get("max_sequence"), target.onnx.sequence, longest]
    prompts = sentence.get("prompts") or {}
    found: dict[str, Any] = {
        "max_tokens": min([n for n in limits if isinstance(n, int) and n > 0], default=target.runtime.context),
        "pad_id": int(checkpoint.config.get("pad_token_id") or 0),
        "special_tokens": special_tokens(tokenizer),
        "lower_case": bool(sentence.get("lower_case")),
        "prompt": str(prompts.get(sentence.get("default_prompt")) or ""),
        "prompts": prompts,
    }
    if target.onnx.sequence:
        found["padded_to"] = target.onnx.sequence
    if target.onnx.batch:
        found["rows"] = target.onnx.batch
    if report["task"] == "fill-mask":
        found["mask_id"], found["mask_token"] = _mask(checkpoint, tokenizer)
    return found


def special_tokens(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """Ids put before, between and after texts.

    Args:
        tokenizer: tokenizer.json.

    Returns:
        `before`, `between` (two texts), `after`, and `types`: True where a second text and what follows have type 1.
    """
    nodes = [tokenizer.get("post_processor") or {}]
    while nodes:
        node = nodes.pop(0)
        kind = node.get("type")
        if kind == "Sequence":
            nodes += node.get("processors") or []
        elif kind in ("BertProcessing", "RobertaProcessing"):
            first, end = int(node["cls"][1]), int(node["sep"][1])
            twice = [end] if kind == "BertProcessing" else [end, end]
            return {"before": [first], "between": twice, "after": [end], "types": kind == "BertProcessing"}
        elif kind == "TemplateProcessing":
            return _template(node)
    return {"before": [], "between": [], "after": [], "types": False}


def _template(node: Mapping[str, Any]) -> dict[str, Any]:
    ids = {name: [int(i) for i in entry["ids"]] for name, entry in (node.get("special_tokens") or {}).items()}

    def parts(pieces: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """Special ids before the first text, behind it, behind the second."""
        found: list[list[int]] = [[]]
        for piece in pieces:
            if "Sequence" in piece:
                found.append([])
            else:
                found[-1] += ids.get(piece["SpecialToken"]["id"], [])
        return [*found, [], []]

    pair = node.get("pair") or []
    types = [int(piece["Sequence"].get("type_id") or 0) for piece in pair if "Sequence" in piece]
    before, after = parts(node.get("single") or [])[:2]
    return {"before": before, "between": parts(pair)[1], "after": after, "types": types[1:] == [1]}


def _mask(checkpoint: Checkpoint, tokenizer: Mapping[str, Any]) -> tuple[int | None, str | None]:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        entry = (checkpoint.json(name) or {}).get("mask_token")
        text = entry.get("content") if isinstance(entry, Mapping) else entry
        if isinstance(text, str):
            added = [one for one in tokenizer.get("added_tokens") or [] if one.get("content") == text]
            vocabulary = (tokenizer.get("model") or {}).get("vocab")
            own = vocabulary.get(text) if isinstance(vocabulary, Mapping) else None
            return (int(added[0]["id"]) if added else own), text
    return None, None


def image_settings(checkpoint: Checkpoint, size: list[int]) -> dict[str, Any]:
    """What happens to a picture before the graph.

    Args:
        checkpoint: The source; preprocessor_config.json is there.
        size: Height and width the graph was made for.

    Returns:
        `height`, `width`; `resize` to [height, width], or `shortest_edge` with the middle cropped out of it;
        `resample`; `scale`, `mean` and `std`: a pixel 0..255 of a channel becomes (pixel * scale - mean) / std.
    """
    settings = checkpoint.json(PREPROCESSOR) or {}
    height, width = size
    found: dict[str, Any] = {
        "height": height,
        "width": width,
        "resample": _FILTERS.get(int(settings.get("resample", 2)), "bilinear"),
        "scale": float(settings.get("rescale_factor", 1 / 255)) if settings.get("do_rescale", True) else 1.0,
        "channels": "RGB",
    }
    normalise = settings.get("do_normalize", True)
    found["mean"] = [float(v) for v in settings.get("image_mean", [0.5] * 3)] if normalise else [0.0] * 3
    found["std"] = [float(v) for v in settings.get("image_std", [0.5] * 3)] if normalise else [1.0] * 3
    edge = settings.get("size")
    shortest = edge.get("shortest_edge") if isinstance(edge, Mapping) else None
    if shortest and "crop_pct" in settings and shortest < 384:  # ConvNextImageProcessor.resize
        return found | {"shortest_edge": int(shortest / float(settings["crop_pct"] or _FULL / 256))}
    if shortest and settings.get("do_center_crop"):
        return found | {"shortest_edge": int(shortest)}
    return found | {"resize": [height, width]}
