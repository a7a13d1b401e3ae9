"""A checkpoint written again with trained weights: in the number format it had, shard by shard under the same names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from edgepack import model_folder
from edgepack.calibrate.layers import parameter_name
from edgepack.checkpoint import Checkpoint
from edgepack.files import copy, storage_errors


def write_model(checkpoint: Checkpoint, model: Any, folder: Path) -> set[str]:
    """Write a checkpoint again with the weights a loaded model has now; everything else as it was.

    Args:
        checkpoint: Where the model was loaded from: names, number formats, shards, the other files.
        model: From `load_model`, changed.
        folder: An empty folder.

    Returns:
        Names of the model's parameters that were written.

    Raises:
        StorageError: The file system refused.
    """
    written: set[str] = set()
    parameters = {name: value.detach().cpu() for name, value in model.named_parameters(remove_duplicate=False)}
    with storage_errors(folder):
        for name in model_folder.allowed_files(checkpoint.path):
            real = model_folder.locate(checkpoint.path, name)
            # Steps behind the encoder of a sentence-transformers folder have weights of their own.
            if real is not None and not model_folder.WEIGHTS.fullmatch(name):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                copy(real, folder / name)
        for file in sorted({info.file for info in checkpoint.tensors.values()}):
            with safe_open(file, framework="pt") as shard:
                kept = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 (not a mapping)
                metadata = shard.metadata()
            for name, values in kept.items():
                own = _loaded_name(name, parameters)
                trained = parameters.get(own)
                if trained is not None and trained.shape == values.shape:
                    kept[name] = trained.to(values.dtype).contiguous()
                    written.add(own)
            save_file(kept, folder / file.name, metadata=metadata or {"format": "pt"})
    return written


def _loaded_name(source: str, parameters: Mapping[str, Any]) -> str:
    """A tensor's name in the class that was loaded, which may lack the prefix of a head that was saved with it."""
    # Norms of checkpoints that came from TensorFlow: transformers' modeling_utils renames them as it loads.
    source = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", source))
    found = parameter_name(source, parameters)
    if found in parameters:
        return found
    beginning = [name for name in parameters if source.endswith(f".{name}")]
    return beginning[0] if len(beginning) == 1 else source
