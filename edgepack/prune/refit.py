"""What stays makes up for what went: least squares on calibration text, before any training.

    neurons, heads   r = W_g a_g                what the columns that went (g) added to the hidden state
    layers           r = h_after - h_before     what a run of layers that went added, to the last matrix before it
    W_k += (sum r a_k^T) (sum a_k a_k^T + damping)^-1

a_k is what the columns that stay are given in the full model. The damping is that of a ridge regression, a part of each
column's own mean square. Shapes stay what the cut makes them, so the model is no larger and no slower.

Sources: He et al., arXiv:1707.06168, section 3 (channels); ReplaceMe, arXiv:2505.02819 (layers), which fits a matrix
on what the feed-forward network gives, where this fits all of its last matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch

from edgepack.errors import StepError
from edgepack.prune.anatomy import Anatomy, Sizes
from edgepack.prune.cost import SUMS_BYTES
from edgepack.prune.cut import Cut, Piece, query_width, spread
from edgepack.prune.running import Batch, Running
from edgepack.prune.width import changed, reading_columns
from edgepack.worker import Progress, no_progress

# Damping is 2 x inputs / positions: the less text, the more. On ref-llama-37m without 256 of 1,280 neurons, the best of
# (0.01, 0.1, 0.3, 1) was 1 with 2,048 positions, 0.3 to 1 with 6,144, and made no difference from 16,384 on.
_DAMPING, _LEAST_DAMPING, _MOST_DAMPING = 2.0, 0.05, 2.0
_ADDITIVE = 1e-2  # of the change that arrives: more of it bent means that a norm is in between
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class Target:
    """A matrix that makes up for something.

    Args:
        layer: Original number.
        module: Inside the layer.
        kept: Its inputs that stay, ascending; None for all.
        run: First layer that went right after it, and the one after the last; None where none went.
    """

    layer: int
    module: str
    kept: tuple[int, ...] | None = None
    run: tuple[int, int] | None = None

    @property
    def stop(self) -> int:
        """The layer up to which the model has to run."""
        return self.layer + 1 if self.run is None else self.run[1]


@dataclass
class Sums:
    """Over positions of calibration text, float32: `moments` a a^T `[in, in]`; `cross` r a^T `[out, in]` of a run."""

    moments: torch.Tensor
    cross: torch.Tensor | None
    positions: int = 0

    def add(self, inputs: torch.Tensor, lost: torch.Tensor | None) -> None:
        """Positions in rows."""
        self.moments.addmm_(inputs.T, inputs)
        self.positions += len(inputs)
        if self.cross is not None and lost is not None:
            self.cross.addmm_(lost.T, inputs)


def targets(anatomy: Anatomy, sizes: Sizes, cut: Cut, *, additive: bool) -> list[Target]:
    """The matrices that can make up for a cut, by layer.

    Args:
        anatomy: Of the model.
        sizes: Of the source.
        cut: What stays.
        additive: What a feed-forward network gives is added to the hidden state as it is (`arrives`).
    """
    layers = list(cut.layers or range(sizes.layers))
    found = []
    for number, following in zip(layers, [*layers[1:], sizes.layers], strict=True):
        groups, neurons = cut.groups.get(number), cut.neurons.get(number)
        if groups:
            found.append(Target(number, anatomy.attention[3], tuple(spread(groups, query_width(sizes)).tolist())))
        run = (number + 1, following) if additive and following > number + 1 else None
        if neurons or run:
            found.append(Target(number, anatomy.ffn_out, neurons or None, run))
    return found


def arrives(running: Running, anatomy: Anatomy) -> float | None:
    """How much of what a feed-forward network gives arrives in the hidden state; None where a norm stands in between.

    1 for most decoders, Granite's `residual_multiplier`; Gemma, OLMo 2 and BERT normalise. Seen from what a small
    change at the first layer's last matrix does, so no family has to be known.

    Raises:
        StepError: NaN or infinite values in the model.
    """
    batch, module = running.batches[0], running.layers[0].get_submodule(anatomy.ffn_out)
    change: list[torch.Tensor] = []

    def disturb(_: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
        change.append(noise * output.square().mean().sqrt())
        return output + change[0]

    plain = running.span(batch, 0, 1, None)
    _refuse_nan(plain)
    handle = module.register_forward_hook(disturb)
    try:
        moved = running.span(batch, 0, 1, None) - plain
    finally:
        handle.remove()
    share = float((moved * change[0]).sum() / change[0].square().sum())
    bent = float((moved - share * change[0]).norm() / moved.norm())
    return share if bent < _ADDITIVE else None


def gather(
    running: Running, anatomy: Anatomy, chosen: Sequence[Target], *, progress: Progress = no_progress
) -> Iterator[tuple[Target, Sums]]:
    """Run the text through the full model once, a few layers of all of it at a time.

    Args:
        running: The full model on calibration text.
        anatomy: Of the model.
        chosen: From `targets`, by layer.
        progress: In batches of a group of layers.

    Yields:
        Every target with its sums, which belong to the receiver.

    Raises:
        StepError: NaN or infinite values in the model.
    """
    groups = _groups(running, anatomy, chosen)
    hidden: list[torch.Tensor | None] = [None] * len(running.batches)
    start = done = 0
    for group in groups:
        sums = [_zeros(running, anatomy, target) for target in group]
        stop = max(target.stop for target in group)
        for place, batch in enumerate(running.batches):
            with _watching(running, group) as seen:
                hidden[place] = running.span(batch, start, stop, hidden[place])
            for target, own in zip(group, sums, strict=True):
                own.add(*_rows(target, seen, batch))
            done += 1
            progress(done, len(groups) * len(running.batches))
        for own in sums:
            _refuse_nan(own.moments)
        yield from zip(group, sums, strict=True)
        start = stop


def fitted(weight: torch.Tensor, target: Target, sums: Sums, share: float) -> torch.Tensor:
    """The columns that stay, made up for the others and for the run.

    Args:
        weight: Of the full model, `[out, in]`.
        target: What is made up for.
        sums: Of its inputs.
        share: From `arrives`.

    Returns:
        `[out, kept]`, float32.
    """
    inputs = weight.shape[1]
    kept = _kept(weight, target)
    gone = torch.ones(inputs, dtype=torch.bool).index_fill(0, kept, False).nonzero()[:, 0]
    lost = weight[:, gone].double() @ sums.moments[gone][:, kept].double()
    if sums.cross is not None:
        lost += sums.cross[:, kept].double() / share
    square = sums.moments[kept][:, kept].double()
    damping = min(_MOST_DAMPING, max(_LEAST_DAMPING, _DAMPING * len(kept) / sums.positions))
    own = square.diagonal()
    own.add_(damping * own.clamp_min(1e-6 * float(own.mean()) + torch.finfo(torch.float64).tiny))
    found = torch.cholesky_solve(lost.T, torch.linalg.cholesky(square)).T
    return weight[:, kept] + found.float()


class Refit:
    """Matrices of a cut model that make up for what went.

    Args:
        anatomy: Of the model.
        matrices: Target -> `[out, kept]`, in the checkpoint's number format.
    """

    def __init__(self, anatomy: Anatomy, matrices: Mapping[Target, torch.Tensor]) -> None:
        self._anatomy, self._matrices = anatomy, matrices
        self._by_name = {(target.layer, f"{target.module}.weight"): matrix for target, matrix in matrices.items()}

    @contextmanager
    def applied(self, running: Running) -> Iterator[None]:
        """The full model in memory with these matrices for a while; what went is left out by others."""
        changes = []
        for target, matrix in self._matrices.items():
            columns = _weight(running, self._anatomy, target)
            changes.append((columns, _kept(columns, target), matrix))
        with changed(changes):
            yield

    def change(self, piece: Piece, first: int, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Rows of a matrix as they are to be written; a `Change` of weights.py."""
        place = self._anatomy.place(piece.info.name)
        matrix = None if place is None else self._by_name.get(place[1:])
        if matrix is None:
            return rows
        stored = (matrix.T if self._anatomy.transposed else matrix)[first : first + len(rows)].contiguous()
        plain = stored.view(torch.uint16) if stored.dtype == torch.bfloat16 else stored  # numpy has no bfloat16
        found: npt.NDArray[Any] = plain.numpy().view(rows.dtype).reshape(rows.shape)
        return found


def refit(
    running: Running,
    anatomy: Anatomy,
    chosen: Sequence[Target],
    share: float,
    dtypes: Mapping[tuple[int, str], str],
    *,
    progress: Progress = no_progress,
) -> Refit:
    """Fit all targets.

    Args:
        running: The full model on calibration text.
        anatomy: Of the model.
        chosen: From `targets`.
        share: From `arrives`; 1 where no layers went.
        dtypes: Number formats of the checkpoint in safetensors' terms, by layer and name of the tensor inside it:
            what is tried is what will be written.
        progress: As `gather`'s.
    """
    found = {}
    for target, sums in gather(running, anatomy, chosen, progress=progress):
        matrix = fitted(_weight(running, anatomy, target), target, sums, share)
        found[target] = matrix.to(_DTYPES[dtypes[target.layer, f"{target.module}.weight"]])
    return Refit(anatomy, found)


def _weight(running: Running, anatomy: Anatomy, target: Target) -> torch.Tensor:
    weight: torch.Tensor = running.layers[target.layer].get_submodule(target.module).weight
    return reading_columns(weight, anatomy)


def _refuse_nan(values: torch.Tensor) -> None:
    if not torch.isfinite(values).all():
        raise StepError("the model's hidden states are NaN or infinite on the text")


def _kept(weight: torch.Tensor, target: Target) -> torch.Tensor:
    return torch.arange(weight.shape[1]) if target.kept is None else torch.tensor(target.kept)


def _zeros(running: Running, anatomy: Anatomy, target: Target) -> Sums:
    outputs, inputs = _weight(running, anatomy, target).shape
    return Sums(torch.zeros(inputs, inputs), None if target.run is None else torch.zeros(outputs, inputs))


def _groups(running: Running, anatomy: Anatomy, chosen: Sequence[Target]) -> list[list[Target]]:
    """Neighbours whose sums fit in memory together; the matrices of one layer are never parted."""
    found: list[list[Target]] = []
    used = 0
    for target in chosen:
        outputs, inputs = _weight(running, anatomy, target).shape
        need = 4 * inputs * (inputs + (outputs if target.run else 0))
        if found and (found[-1][-1].layer == target.layer or used + need <= SUMS_BYTES):
            found[-1].append(target)
            used += need
        else:
            found.append([target])
            used = need
    return found


@contextmanager
def _watching(running: Running, group: Sequence[Target]) -> Iterator[dict[Any, torch.Tensor]]:
    """What the matrices of a group are given, by target; and what layers around their runs give, by number."""
    seen: dict[Any, torch.Tensor] = {}

    def given(target: Target) -> Any:
        def keep(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            seen[target] = args[0]

        return running.layers[target.layer].get_submodule(target.module).register_forward_pre_hook(keep)

    def gives(number: int) -> Any:
        def keep(_: Any, args: Any, output: Any) -> None:
            seen[number] = output[0] if isinstance(output, tuple) else output

        return running.layers[number].register_forward_hook(keep)

    handles = [given(target) for target in group]
    ends = {end - 1 for target in group if target.run is not None for end in target.run}
    handles += [gives(number) for number in ends]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _rows(target: Target, seen: Mapping[Any, torch.Tensor], batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Positions in rows, without padding: inputs, and what the run added."""
    mask = batch.get("attention_mask")

    def rows(values: torch.Tensor) -> torch.Tensor:
        return values.flatten(0, -2) if mask is None else values[mask.bool()]

    if target.run is None:
        return rows(seen[target]), None
    first, stop = target.run
    return rows(seen[target]), rows(seen[stop - 1] - seen[first - 1])
