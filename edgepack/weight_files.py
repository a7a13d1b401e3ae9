"""Which safetensors files a model consists of, from the names in its folder and the shard index.

The order is that of transformers (`modeling_utils.py`): `model.safetensors`, else the shards that
`model.safetensors.index.json` names, else the only safetensors file there is. Whatever else lies beside them
(`pytorch_model.bin`, `consolidated.safetensors`, `onnx/`) is not part of the model. Works on names, so that a hub
listing and a folder are judged alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edgepack import strict_json
from edgepack.errors import InputRefused
from edgepack.model_folder import PICKLES, WEIGHTS
from edgepack.safetensors_header import check_name

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_INDEX_BYTES = 16 << 20


def select(names: Sequence[str], weight_map: Callable[[], dict[str, str]], where: str) -> tuple[str, ...]:
    """Names of the weight files.

    Args:
        names: Every name in the folder or repository.
        weight_map: Reads the index; called only if it is needed.
        where: The folder or hub id, for messages.

    Raises:
        InputRefused: None, several without an index, an adapter, or only pickle checkpoints; the hint says what to do.
    """
    if SINGLE_FILE in names:
        return (SINGLE_FILE,)
    if INDEX_FILE in names:
        return tuple(sorted(set(weight_map().values())))
    found = sorted(name for name in names if WEIGHTS.fullmatch(name) and not name.startswith("adapter_"))
    if len(found) == 1:
        return (found[0],)
    if found:
        raise InputRefused(
            f"{where}: {len(found)} safetensors files ({found[0]}, {found[1]}{', ...' if found[2:] else ''}) "
            f"and no {INDEX_FILE}",
            hint=f"Fetch {INDEX_FILE} as well; it says which file holds which tensor.",
        )
    raise _none(names, where)


def _none(names: Sequence[str], where: str) -> InputRefused:
    if "adapter_config.json" in names:
        return InputRefused(
            f"{where}: a LoRA adapter, not a whole model",
            hint="Merge it into its base model (peft: merge_and_unload, then save_pretrained) and give the result.",
        )
    for name in sorted(names):
        if PICKLES.fullmatch(name):
            return InputRefused(
                f"{where}: only pickle weights ({name[:80]}), which can run code; edgepack never opens them",
                hint="If you trust them, convert once with transformers: AutoModelForCausalLM.from_pretrained(OLD)"
                ".save_pretrained(NEW), then copy the tokenizer files; or ask the authors for safetensors.",
            )
    for name in sorted(names):
        if name.endswith(".gguf"):
            return InputRefused(f"{where}: no safetensors, but {name[:80]}", hint="Give the .gguf file itself.")
    if any(name.split("/")[0] == "0_Transformer" for name in names):
        return InputRefused(
            f"{where}: the model is in the sub-folder 0_Transformer", hint="Give that folder: it has config.json."
        )
    return InputRefused(f"{where}: no *.safetensors files", hint="Give a model folder in the Hugging Face layout.")


def parse_index(data: bytes, where: str) -> dict[str, str]:
    """The weight map of an index, tensor name -> file name.

    Raises:
        InputRefused: Not strict JSON, no weight map, a name that is no plain tensor or safetensors name.
    """
    weight_map = strict_json.parse_object(data, where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputRefused(f"{where}: weight_map must be a non-empty object")
    for tensor, file in weight_map.items():
        check_name(tensor, where)
        if not isinstance(file, str) or not WEIGHTS.fullmatch(file):
            raise InputRefused(f"{where}: tensor {tensor}: {str(file)[:80]!r} is no safetensors file of this folder")
    return weight_map
