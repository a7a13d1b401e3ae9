"""A model in transformers whose layers can be left out for a while, and what it makes of fixed inputs.

A layer that is left out hands on what it gets: the same numbers as a model without it. What every layer was given can
be remembered, so that leaving out one more costs only the layers after it. Decoders give logits, encoders vectors.
Float32, 4 bytes of memory per parameter; only ever used in a worker process.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from edgepack.errors import StepError

Batch = Mapping[str, torch.Tensor]
# What from_pretrained raises for folders it does not understand.
_LOADING = (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError)
POOLINGS = ("mean", "cls", "lasttoken")


def load(folder: Path, *, generates: bool) -> Any:
    """The model of a folder, for inference in float32.

    Args:
        folder: A linted checkpoint.
        generates: With its language-model head; else the bare encoder.

    Raises:
        StepError: transformers can't load it, or finds tensors missing.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    auto = transformers.AutoModelForCausalLM if generates else transformers.AutoModel
    try:
        model, found = auto.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except _LOADING as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise StepError(f"{folder.name}: transformers can't load it: {reason[0][:300]}") from error
    lacking = sorted(name for name in found["missing_keys"] if not name.startswith("pooler"))
    if lacking:
        raise StepError(f"{folder.name}: transformers misses {len(lacking)} tensors, first {lacking[0]}")
    return model.eval().requires_grad_(False)


class Running:
    """A model on fixed inputs.

    Args:
        model: From `load`.
        blocks: Its layers.
        batches: Inputs, each a mapping of transformers' argument names to tensors.
        first, stop: For decoders: positions whose logits are wanted.
        pooling: For encoders: `mean`, `cls` or `lasttoken`; None for decoders.
    """

    def __init__(
        self, model: Any, blocks: int, batches: Sequence[Batch], *, first: int, stop: int, pooling: str | None
    ) -> None:
        self.model = model
        self.layers = layer_list(model, blocks)
        self.batches = batches
        self._scored = slice(first, stop)
        self.pooling = pooling

    def outputs(self, batch: Batch) -> torch.Tensor:
        """Logits `[positions, vocabulary]` of the scored positions, or vectors `[texts, hidden]`, float32."""
        with torch.no_grad():
            if self.pooling is None:
                found = self.model(**batch, use_cache=False).logits[:, self._scored].flatten(0, 1)
            else:
                found = pooled(self.model(**batch).last_hidden_state, batch["attention_mask"], self.pooling)
        if not torch.isfinite(found).all():
            raise StepError("the model gives NaN or infinite outputs on the text")
        return found.float()

    @contextmanager
    def without(self, gone: Collection[int]) -> Iterator[None]:
        """The model with some layers left out."""
        with _replaced([(self.layers[number], _hand_on) for number in gone]):
            yield

    @contextmanager
    def resuming(self, start: int, hidden: torch.Tensor, gone: Collection[int]) -> Iterator[None]:
        """The model with what layer `start` is given known: earlier layers cost nothing.

        Args:
            start: First layer that is computed; the number of layers if none is.
            hidden: What it is given.
            gone: Layers left out.
        """

        def known(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return hidden

        changes: list[tuple[Any, Callable[..., Any]]] = [(layer, known) for layer in self.layers[:start]]
        changes += [(self.layers[number], _hand_on) for number in gone if number >= start]
        with _replaced(changes):
            yield

    def span(self, batch: Batch, start: int, stop: int, hidden: torch.Tensor | None) -> torch.Tensor:
        """What layer `stop` is given, or what the last layer gives: only the layers in between are computed.

        Args:
            batch: The inputs.
            start: First layer that is computed.
            stop: One past the last.
            hidden: What layer `start` is given; None to begin with the embedding, at layer 0.
        """
        last: list[torch.Tensor] = []

        def keep_last(module: Any, args: Any, output: Any) -> None:
            last.append(output[0] if isinstance(output, tuple) else output)

        known = hidden if hidden is not None else torch.empty(0)
        handle = self.layers[-1].register_forward_hook(keep_last)
        try:
            with torch.no_grad(), self.resuming(start, known, range(stop, len(self.layers))):
                self.model.base_model(**batch, **({"use_cache": False} if self.pooling is None else {}))
        finally:
            handle.remove()
        return last[0]

    def remember(self, batch: Batch, gone: Collection[int] = ()) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Outputs of a batch, and what every layer was given; the last entry is what the last layer gave."""
        given: list[torch.Tensor] = []

        def keep(module: Any, args: Any, kwargs: Any) -> None:
            given.append(args[0] if args else kwargs["hidden_states"])

        last: list[torch.Tensor] = []

        def keep_last(module: Any, args: Any, output: Any) -> None:
            last.append(output[0] if isinstance(output, tuple) else output)

        handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in self.layers]
        handles.append(self.layers[-1].register_forward_hook(keep_last))
        try:
            with self.without(gone):
                found = self.outputs(batch)
        finally:
            for handle in handles:
                handle.remove()
        if len(given) != len(self.layers):
            raise StepError(f"{type(self.model).__name__}: its {len(self.layers)} layers ran {len(given)} times")
        return found, [*given, *last]


def _hand_on(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden_states


@contextmanager
def _replaced(changes: Sequence[tuple[Any, Callable[..., Any]]]) -> Iterator[None]:
    """Layers with another forward for a while, in the form (tensor or tuple) their own gives."""
    for layer, forward in changes:
        layer.forward = _in_form(layer, forward)
    try:
        yield
    finally:
        for layer, _ in changes:
            del layer.forward


def _in_form(layer: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    if type(layer).__name__ not in _GIVE_TUPLES:
        return forward
    return lambda *args, **kwargs: (forward(*args, **kwargs),)


_GIVE_TUPLES = ("MPNetLayer",)  # modeling_mpnet.py; the other families' layers give the tensor itself


def layer_list(model: Any, blocks: int) -> list[Any]:
    """The transformer layers, in order.

    Raises:
        StepError: There is no list of so many.
    """
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == blocks]
    if not lists:
        raise StepError(f"{type(model).__name__} has no list of {blocks} layers")
    return list(lists[0])


def pooled(hidden: torch.Tensor, mask: torch.Tensor, how: str) -> torch.Tensor:
    """One vector per text.

    Args:
        hidden: `[texts, tokens, width]`.
        mask: `[texts, tokens]`, 0 where a text has ended; padded on the right.
        how: One of `POOLINGS`.
    """
    if how == "cls":
        return hidden[:, 0]
    if how == "lasttoken":
        return hidden[torch.arange(len(hidden)), mask.sum(1) - 1]
    weights = mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)
