"""A checkpoint in transformers, seen as the matrices of its GGUF: which layer computes with which matrix.

Every matrix of the GGUF is made from one tensor of the checkpoint, row by row (`edgepack/gguf/transforms.py` permutes
rows or transposes, never mixes columns), so a row quantized in the checkpoint's order has the codes it will have in the
file. Calibration therefore works on the modules of transformers and needs no architecture's transforms.

Runs in float32: 4 bytes of memory per parameter. Knows nothing of quantization.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgepack.errors import InputRefused, StepError
from edgepack.gguf.model import ModelSpec, TensorSpec

TOKEN_EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
# Positions that have less context than this are left out: their predictions are those of a model that knows nothing.
FIRST_SCORED = 32


@dataclass(frozen=True)
class Matrix:
    """One matrix of the GGUF and where transformers keeps it.

    Args:
        name: GGUF name.
        parameter: Its values in the loaded model, float32; shared with the embedding where the output is tied.
        transposed: The parameter is `[in, out]` (Conv1D of GPT-2), the GGUF's rows are its columns.
        module: The module that multiplies its inputs by it; None for an embedding that is only looked up.
        block: Number of its layer; None outside of the layers.
    """

    name: str
    parameter: Any
    transposed: bool
    module: Any
    block: int | None

    @property
    def rows(self) -> torch.Tensor:
        """A view `[rows, width]` in the orientation of the GGUF, on the model's own memory."""
        values: torch.Tensor = self.parameter.data
        return values.t() if self.transposed else values

    @property
    def width(self) -> int:
        """Inputs: the dimension that is quantized in blocks."""
        return int(self.rows.shape[1])

    @property
    def weights(self) -> int:
        """Number of weights."""
        return int(self.parameter.numel())

    @property
    def looked_up(self) -> bool:
        """True for an embedding table that no product reads."""
        return self.module is None


def load_model(folder: Path) -> Any:
    """The model of a checkpoint folder in float32, for inference only.

    Raises:
        StepError: transformers can't load it.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise StepError(f"calibration: transformers can't load {folder.name}: {str(error).splitlines()[0]}") from error
    return model.eval().requires_grad_(False)


def matrices(model: Any, spec: ModelSpec) -> dict[str, Matrix]:
    """The matrices that quantization changes, by GGUF name, in file order.

    Args:
        model: From `load_model`.
        spec: The description of the same checkpoint.

    Raises:
        InputRefused: A matrix has no counterpart in the loaded model, or one of another shape.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    readers = _readers(model)
    found = {}
    for tensor in spec.tensors:
        if tensor.keep_f32:
            continue
        name = parameter_name(tensor.source, parameters)
        parameter = parameters.get(name)
        shape = None if parameter is None else tuple(parameter.shape)
        if parameter is None or shape not in (tensor.shape, tensor.shape[::-1]) or len(tensor.shape) != 2:
            raise InputRefused(
                f"{tensor.source}: calibration expects a matrix {list(tensor.shape)} in transformers, and finds "
                f"{'none' if shape is None else list(shape)}",
                hint="Build with a preset: --quantize Q4_K_M.",
            )
        # A tied checkpoint may become a GGUF that holds the table twice: the first is then only looked up.
        looked_up = tensor.name == TOKEN_EMBEDDING and not spec.tied
        module = None if looked_up else readers.get(id(parameter))
        found[tensor.name] = Matrix(tensor.name, parameter, _transposed(module), module, _block(tensor.name))
    return found


def _readers(model: Any) -> dict[int, Any]:
    """The module that multiplies by a parameter, by the parameter's id."""
    from transformers.pytorch_utils import Conv1D

    return {id(module.weight): module for module in model.modules() if isinstance(module, torch.nn.Linear | Conv1D)}


def _transposed(module: Any) -> bool:
    return module is not None and not isinstance(module, torch.nn.Linear)


def parameter_name(source: str, parameters: Mapping[str, Any]) -> str:
    """A tensor's name in the class that was loaded: a checkpoint saved without its head lacks a prefix."""
    if source in parameters:
        return source
    ending = [name for name in parameters if name.endswith(f".{source}")]
    return ending[0] if len(ending) == 1 else source


def _block(name: str) -> int | None:
    return int(name.split(".")[1]) if name.startswith("blk.") else None


def row_order(tensor: TensorSpec, matrix: Matrix) -> torch.Tensor:
    """Row of the checkpoint that each row of the GGUF is. Found by comparing the rows themselves, so that it needs no
    knowledge of the architecture's transforms; equal rows are interchangeable.
    """
    rows = matrix.rows
    if tensor.row_block == 1 or matrix.transposed:
        return torch.arange(len(rows))
    places: dict[bytes, list[int]] = {}
    for place, row in enumerate(rows.contiguous().cpu().numpy()):
        places.setdefault(row.tobytes(), []).append(place)
    order = []
    for row in tensor.read(0, tensor.rows):
        same = places.get(row.tobytes())
        if not same:
            raise InputRefused(f"{tensor.source}: the rows of {tensor.name} are not those that transformers loads")
        order.append(same[0] if len(same) == 1 else same.pop(0))
    return torch.tensor(order)


class Forward:
    """The model on fixed windows.

    Args:
        model: From `load_model`.
        windows: Token ids, `[windows, tokens]`, all of one length.
    """

    def __init__(self, model: Any, windows: Sequence[Sequence[int]]) -> None:
        self._model = model
        self._ids = torch.tensor(windows)

    def logits(self) -> torch.Tensor:
        """Logits `[windows x scored positions, vocabulary]`, float32.

        Raises:
            StepError: NaN or infinite ones.
        """
        with torch.no_grad():
            found: torch.Tensor = self._model(self._ids, use_cache=False).logits[:, FIRST_SCORED:-1]
        if not torch.isfinite(found).all():
            raise StepError("calibration: the model gives NaN or infinite logits on the calibration text")
        return found.flatten(0, 1)


@contextmanager
def replaced(matrix: Matrix, values: torch.Tensor) -> Iterator[None]:
    """The model with other values `[rows, width]` of one matrix, for a while."""
    kept = matrix.rows.clone()
    matrix.rows.copy_(values)
    try:
        yield
    finally:
        matrix.rows.copy_(kept)


def mean_kld(reference: torch.Tensor, logits: torch.Tensor) -> float:
    """Mean KL(reference || candidate) in nats per token.

    Args:
        reference: Log-probabilities `[tokens, vocabulary]`.
        logits: Candidate logits, same shape.
    """
    total = 0.0
    for kept, found in zip(reference.split(256), logits.split(256), strict=True):
        difference = kept - torch.log_softmax(found, dim=-1)
        total += float((kept.exp() * difference).sum(dtype=torch.float64))
    return total / len(reference)
