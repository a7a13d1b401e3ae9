"""The folder of a pruned model: config, tokenizer and weights as the cut makes them, everything else as it was."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgepack import model_folder
from edgepack.checkpoint import Checkpoint
from edgepack.errors import InputRefused
from edgepack.files import copy, storage_errors
from edgepack.prune.anatomy import Anatomy, Sizes, find_anatomy, sizes_of
from edgepack.prune.cut import Cut, cut_config, pieces
from edgepack.prune.token_ids import REPLACED, named_ids, renumbered, renumbered_tokenizer_config
from edgepack.prune.vocabulary import without_tokens
from edgepack.prune.weights import Change, unchanged, write_weights
from edgepack.worker import Progress, no_progress

SIDECAR = "edgepack-prune.json"

_WITH_IDS = ("config.json", "generation_config.json", "tokenizer_config.json")
_SIDECAR_BYTES = 64 << 20


def write_folder(
    checkpoint: Checkpoint,
    cut: Cut,
    folder: Path,
    *,
    change: Change = unchanged,
    progress: Progress = no_progress,
) -> list[Path]:
    """Write the model that stays; all of it but the sidecar.

    Args:
        checkpoint: The source.
        cut: What stays.
        folder: An empty folder.
        change: Applied to every block of rows that is written.
        progress: In bytes of weights.

    Returns:
        The safetensors files.

    Raises:
        InputRefused: The model can't be pruned, a file of it is unsafe, or a token id in one can't be changed.
        StorageError: The file system refused.
    """
    anatomy = find_anatomy(checkpoint)
    sizes = sizes_of(checkpoint, anatomy)
    kept = list(pieces(checkpoint, anatomy, sizes, cut))
    with storage_errors(folder):
        _write_texts(checkpoint, anatomy, sizes, cut, folder)
        return write_weights(folder, kept, change=change, progress=progress)


def _write_texts(checkpoint: Checkpoint, anatomy: Anatomy, sizes: Sizes, cut: Cut, folder: Path) -> None:
    number = None if cut.tokens is None else {old: new for new, old in enumerate(cut.tokens)}
    config = cut_config(checkpoint.config, anatomy, sizes, cut, _layer_types(checkpoint))
    if number is not None:
        config = renumbered(config, number)
        _check_padding(checkpoint, anatomy, config)
    _write(folder / "config.json", config)
    for name in model_folder.allowed_files(checkpoint.path):
        top_weights = model_folder.WEIGHTS.fullmatch(name) or name.endswith(".safetensors.index.json")
        if name == "config.json" or top_weights:
            continue
        if number is not None and REPLACED.fullmatch(name):
            continue
        if number is not None and (name == "tokenizer.json" or name in _WITH_IDS):
            _write(folder / name, _renumbered(checkpoint, name, cut.tokens or (), number))
            continue
        real = model_folder.locate(checkpoint.path, name)
        if real is not None:
            (folder / name).parent.mkdir(exist_ok=True)
            copy(real, folder / name)


def write_sidecar(folder: Path, document: Mapping[str, Any]) -> None:
    """What was removed, why, and what it cost."""
    _write(folder / SIDECAR, document)


def read_sidecar(folder: Path) -> dict[str, Any] | None:
    """The sidecar of a folder that was pruned before; None for another.

    Raises:
        InputRefused: Not JSON, too large, or a link.
    """
    from edgepack.strict_json import parse_object

    real = model_folder.locate(folder, SIDECAR, allowed=lambda name: name == SIDECAR)
    if real is None:
        return None
    return parse_object(model_folder.read_capped(real, _SIDECAR_BYTES), str(folder / SIDECAR))


def _layer_types(checkpoint: Checkpoint) -> list[str] | None:
    """What transformers takes every layer for; None where it does not say."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
    found = getattr(config, "layer_types", None)
    return [str(kind) for kind in found] if isinstance(found, list | tuple) else None


def special_ids(checkpoint: Checkpoint) -> set[int]:
    """Token ids that configuration files name."""
    found = set(named_ids(checkpoint.config))
    for name in ("generation_config.json", "tokenizer_config.json"):
        found |= set(named_ids(checkpoint.json(name) or {}))
    return found


def _renumbered(checkpoint: Checkpoint, name: str, kept: Sequence[int], number: Mapping[int, int]) -> dict[str, Any]:
    document = checkpoint.json(name)
    if document is None:
        raise InputRefused(f"{checkpoint.path / name}: vanished while it was being read")
    if name == "tokenizer.json":
        return without_tokens(document, kept)
    return (renumbered_tokenizer_config if name == "tokenizer_config.json" else renumbered)(document, number)


def _check_padding(checkpoint: Checkpoint, anatomy: Anatomy, config: Mapping[str, Any]) -> None:
    before, after = checkpoint.config.get("pad_token_id"), config.get("pad_token_id")
    if anatomy.padded_positions and before != after:
        raise InputRefused(
            f"{checkpoint.path.name}: positions are counted from the padding token's id, which would change from "
            f"{before} to {after}"
        )


def _write(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
