"""What calibration learns of a model: how its inputs to each matrix vary, and how much each output matters.

For a matrix W with inputs x and outputs y = W x, over the tokens of a text:

    moments    E[x x^T]                  what column feedback weighs errors with; its diagonal is the importance matrix
    gradients  E[(d nll / d y_n)^2]      how fast the divergence from the model grows with an error of output n

The label of a position is drawn from the model's own prediction there, so the expected squared gradient is the diagonal
of the Fisher information, and half of it times a squared error is the KL divergence that error causes (to second
order). Errors of different matrices and tokens are taken as independent. Source: Martens, "New insights and
perspectives on the natural gradient method", arXiv:1412.1193, sections 5 and 9.2.

Runs the model in float32 in transformers: 4 bytes of memory per parameter, and the gradients of one window. Draws are
seeded; results are the same for the same torch, machine and number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from edgepack.errors import EdgepackError, InputRefused, StepError
from edgepack.worker import Progress, no_progress

_SEED = 20260101
MOMENTS_BYTES = 2 << 30  # of second moments held at a time; more matrices take more passes over the text


def width(layer: Any) -> int:
    """Inputs of a linear layer: torch keeps `[out, in]`, the Conv1D of GPT-2 `[in, out]`."""
    return int(layer.weight.shape[1] if isinstance(layer, torch.nn.Linear) else layer.weight.shape[0])


def groups(layers: Mapping[str, Any], limit: int = MOMENTS_BYTES) -> Iterator[dict[str, Any]]:
    """Layers in portions whose second moments fit; the count of an input shared by layers is on the safe side."""
    part: dict[str, Any] = {}
    held = 0
    for name, layer in layers.items():
        nbytes = 4 * width(layer) ** 2
        if part and held + nbytes > limit:
            yield part
            part, held = {}, 0
        part[name] = layer
        held += nbytes
    if part:
        yield part


class Collector:
    """Statistics of a model over windows of tokens.

    Args:
        model: A causal language model of transformers in float32.
        windows: Token ids, one row per window.
    """

    def __init__(self, model: Any, windows: Sequence[Sequence[int]]) -> None:
        self._model, self._windows = model, torch.tensor(windows)
        self._tokens = self._windows.numel()

    def gradients(
        self, layers: Mapping[str, Any], progress: Progress = no_progress
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Mean squared gradients of the outputs of layers, and of the rows looked up in the embedding.

        Raises:
            InputRefused: It gives NaN or infinite logits, because such weights are in it.
            StepError: It gives them with finite weights.
        """
        sums = {name: torch.zeros(layer.weight.numel() // width(layer)) for name, layer in layers.items()}
        table = self._model.get_input_embeddings()
        embedding = torch.zeros(table.embedding_dim)
        generator = torch.Generator().manual_seed(_SEED)

        def watch(name: str) -> Any:
            def seen(gradient: torch.Tensor) -> None:
                sums[name] += gradient.flatten(0, -2).square().sum(0)

            return lambda layer, inputs, output: output.register_hook(seen) and None

        with _hooks({name: (layer, watch(name)) for name, layer in layers.items()}):
            for done, ids in enumerate(self._windows, 1):
                inputs = table(ids[None]).requires_grad_(True)
                scale = float(inputs.detach().norm() / table.weight[ids].norm())  # Gemma's module multiplies the rows
                with torch.enable_grad():
                    logs = torch.log_softmax(self._model(inputs_embeds=inputs, use_cache=False).logits[0], dim=-1)
                    if not torch.isfinite(logs).all():
                        raise self._not_finite()
                    labels = torch.multinomial(logs.detach().exp(), 1, generator=generator)
                    (gradient,) = torch.autograd.grad(-logs.gather(1, labels).sum(), inputs)
                embedding += (scale * gradient[0]).square().sum(0)
                progress(done, len(self._windows))
        return {name: total / self._tokens for name, total in sums.items()}, embedding / self._tokens

    def _not_finite(self) -> EdgepackError:
        for name, parameter in self._model.named_parameters():
            bad = int((~torch.isfinite(parameter)).sum())
            if bad:
                return InputRefused(
                    f"{name}: {bad} of {parameter.numel()} weights are NaN or infinite, expected finite ones",
                    hint="The checkpoint is damaged, or it overflowed in training.",
                )
        return StepError("calibration: the model gives NaN or infinite logits on the calibration text")

    def moments(self, layers: Mapping[str, Any], progress: Progress = no_progress) -> dict[str, torch.Tensor]:
        """Second moments of the inputs of layers; layers that are given the same tensor share one."""
        found: dict[str, torch.Tensor] = {}
        last: list[Any] = [None, None]  # the input seen last, and its moments

        def watch(name: str) -> Any:
            def seen(layer: Any, inputs: Any, output: Any) -> None:
                if inputs[0] is not last[0]:
                    rows = inputs[0].flatten(0, -2)
                    total = found.get(name)
                    total = torch.zeros(rows.shape[1], rows.shape[1]) if total is None else total
                    last[:] = [inputs[0], total.addmm_(rows.t(), rows)]
                found[name] = last[1]

            return seen

        with torch.no_grad(), _hooks({name: (layer, watch(name)) for name, layer in layers.items()}):
            for done, ids in enumerate(self._windows, 1):
                last[:] = [None, None]
                self._model(ids[None], use_cache=False)
                progress(done, len(self._windows))
        for total in {id(total): total for total in found.values()}.values():
            total /= self._tokens
        return found


@contextmanager
def _hooks(watched: Mapping[str, tuple[Any, Any]]) -> Iterator[None]:
    handles = [layer.register_forward_hook(hook) for layer, hook in watched.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
