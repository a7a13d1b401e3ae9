"""Quantize an exported encoder: one float32 graph in, one quantized graph out.

The same graph, recipe, calibration data and toolchain give the same bytes. What the recipes are is in `recipes.py`;
which one to take, and which nodes to treat better, is the caller's to say. Runs in a worker process only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgepack.errors import UsageError
from edgepack.onnx.blocks import quantize_blocks
from edgepack.onnx.calibrate import Feed, activations, feed, read_samples
from edgepack.onnx.check import check_model
from edgepack.onnx.dynamic import matrix_name, quantize_products, smooth
from edgepack.onnx.embeddings import quantize_tables
from edgepack.onnx.export import MODEL
from edgepack.onnx.folding import fold_into_values
from edgepack.onnx.half import compute_half, store_half
from edgepack.onnx.integers import Floats
from edgepack.onnx.recipes import RECIPES as RECIPES
from edgepack.onnx.recipes import Recipe, recipe_named
from edgepack.onnx.rewrite import Graph, known_nodes, read_graph
from edgepack.onnx.smoothing import Smoothing, choose_factor
from edgepack.onnx.static import find_ranges, quantize_for_npu, quantize_static
from edgepack.onnx.units import Unit, units
from edgepack.runtimes.onnxruntime import CPU, Session
from edgepack.worker import Progress

ARCHITECTURES = ("x86_64", "arm64")
CALIBRATION_SAMPLES = 64  # sentences; twice as many changed no figure of all-MiniLM-L6-v2 in the third digit
_LARGE = 1024  # weights; smaller tensors are not worth naming


def quantize(
    *,
    model: str,
    folder: str,
    recipe: str,
    calibration: str | None = None,
    keep: Sequence[str] = (),
    finer: Sequence[str] = (),
    arch: str = "x86_64",
    provider: str = CPU,
    source: str | None = None,
    task: str = "feature-extraction",
    pairs: bool = False,
    threads: int = 1,
    progress: Progress,
) -> dict[str, Any]:
    """Quantize an encoder.

    Args:
        model: Folder with the float32 export, model.onnx.
        folder: An existing folder for the result.
        recipe: Name of a row of `RECIPES`.
        calibration: Text, or `.npy` of preprocessed images, for recipes that need data.
        keep: Names of nodes that stay in float32.
        finer: Names of nodes that get more precision: 16-bit activations by a second 8-bit product (`dynamic.py`), or
            8 bits where the recipe has 4.
        arch: `x86_64`: weights that can't saturate AVX2's 16-bit sums. `arm64`: no such limit, symmetric activations.
        provider: Execution provider of onnxruntime that will run it.
        source: Folder with tokenizer.json; None: `model`.
        task: What the graph does, for the shape of calibration samples.
        pairs: The graph classifies two texts.
        threads: For running the float32 graph on calibration data.
        progress: Called with (parts done, parts); a part is a unit calibrated, or the rewriting.

    Returns:
        `files`, `bytes`, `recipe`, `kept`, `finer`, `smoothed` (node -> exponent), `tables` (embeddings quantized),
        `left_in_float` (operator -> number of nodes with float32 weights), `bits_per_weight`.

    Raises:
        UsageError: Unknown recipe, node or architecture; calibration data missing; free axes where none may be.
        InputRefused: The graph or the data is not what it should be; weights that are not finite.
        StepError: onnxruntime can't quantize the graph.
    """
    row = recipe_named(recipe)
    if row.needs_calibration and calibration is None:
        raise UsageError(
            f"quantize = {recipe!r} needs calibration data, and none was given",
            hint="Name a text, or an .npy of preprocessed images, with --calibration; int8-dynamic needs none.",
        )
    if finer and not row.has_finer:
        raise UsageError(f"quantize = {recipe!r} has no finer precision for single nodes", hint="Keep them in float32.")
    graph = read_graph(Path(model))
    known_nodes(graph, [*keep, *finer], "keep")
    check_shapes(row, graph)
    feeds: list[Feed] = []
    if row.needs_calibration:
        samples = read_samples(
            calibration, Path(source or model), graph.inputs, CALIBRATION_SAMPLES, task=task, pairs=pairs
        )
        feeds = [feed(sample, graph.inputs) for sample in samples]
    workshop = Workshop(Path(model), graph, feeds, arch, provider, threads)
    return workshop.make(Path(folder), row, frozenset(keep), frozenset(finer), progress)


def check_shapes(row: Recipe, graph: Graph) -> None:
    """Refuse free axes where the recipe's runtime has none.

    Raises:
        UsageError: An input has a free axis.
    """
    free = [port.name for port in graph.inputs if not all(isinstance(axis, int) for axis in port.shape or (None,))]
    if row.fixed_shapes and free:
        raise UsageError(
            f"quantize = {row.name!r} is for processors that need fixed shapes; {', '.join(free)} has free axes",
            hint="Fix them with --set onnx.batch=1 --set onnx.sequence=128 (images: onnx.batch alone).",
        )


def find_factors(
    path: Path,
    graph: Graph,
    found: Sequence[Unit],
    feeds: Sequence[Feed],
    *,
    pair_safe: bool,
    threads: int,
    progress: Progress,
) -> dict[str, Smoothing]:
    """Choose smoothing factors for every unit, from what flows into it.

    Args:
        path: model.onnx, in float32.
        graph: The same in memory.
        found: Units.
        feeds: Calibration data.
        pair_safe: As the weights will be quantized.
        threads: For running the graph.
        progress: In units, and one more for the rewriting.
    """
    wanted = {value: unit for unit in found for value in unit.inputs}
    waiting = {unit.name: set(unit.inputs) for unit in found}
    chosen: dict[str, Smoothing] = {}
    samples: dict[str, list[Floats]] = {}
    for value, arrays in activations(path, list(wanted), feeds, threads=threads):
        unit = wanted[value]
        samples.setdefault(unit.name, []).extend(arrays)
        waiting[unit.name].discard(value)
        if not waiting[unit.name]:
            weight = np.concatenate([graph.matrix(product) for product in unit.weights], axis=1)
            chosen[unit.name] = choose_factor(samples.pop(unit.name), weight, pair_safe=pair_safe)
            progress(len(chosen), len(found) + 1)
    return chosen


@dataclass
class Workshop:
    """A float32 graph with its calibration data: makes one quantized version after the other, and nothing twice.

    Args:
        folder: Of the float32 model.
        graph: The same in memory; stays as it is.
        feeds: Calibration data; empty where no recipe needs any.
        arch: `x86_64` or `arm64`.
        provider: Execution provider that will run the results.
        threads: For running the graph.
    """

    folder: Path
    graph: Graph
    feeds: Sequence[Feed]
    arch: str
    provider: str
    threads: int
    _factors: dict[str, Smoothing] | None = None
    _ranges: dict[tuple[str, bool], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.arch not in ARCHITECTURES:
            raise UsageError(f"arch = {self.arch!r}: expected {' or '.join(ARCHITECTURES)}")

    def factors(self, progress: Progress) -> dict[str, Smoothing]:
        """Smoothing factors of all units, by name."""
        if self._factors is None:
            self._factors = find_factors(
                self.folder / MODEL,
                self.graph,
                units(self.graph.products()),
                self.feeds,
                pair_safe=self.arch == "x86_64",
                threads=self.threads,
                progress=progress,
            )
        return self._factors

    def make(
        self, folder: Path, row: Recipe, keep: frozenset[str], finer: frozenset[str], progress: Progress
    ) -> dict[str, Any]:
        """Carry out a recipe and write the result.

        Args:
            folder: Where it goes; exists.
            row: The recipe.
            keep: Nodes left in float32.
            finer: Nodes with more precision. Those that are multiplied twice keep their factors: activations of 16 bits
                don't need them, but the small rows of weights that read large channels do.
            progress: As `quantize`.

        Returns:
            As `quantize`.
        """
        graph = self.graph.copy()
        weights = sum(int(np.prod(tensor.dims)) for tensor in graph.stored.values())
        found = units(graph.products(), keep)
        doubled = {unit.name for unit in found if row.method == "dynamic" and finer.intersection(unit.nodes)}
        smoothing = self._smoothing(row, found, progress)
        factors = {name: one.factor for name, one in smoothing.items() if one.factor is not None}
        tables: list[str] = []
        if row.table_bits <= 8 and not row.fixed_shapes:
            tables = quantize_tables(graph, bits=row.table_bits, block=row.block, keep=keep, finer=finer)
        folded = fold_into_values(graph, found, factors)
        if folded:
            found = units(graph.products(), keep)
        if row.method == "dynamic":
            pair_safe = self.arch == "x86_64"
            quantize_products(graph, found, factors=factors, folded=folded, twice=doubled, pair_safe=pair_safe)
        elif row.method == "blocks":
            chosen = [product for product in graph.products() if product.node not in keep]
            quantize_blocks(graph, chosen, bits=row.weight_bits, block=row.block, finer=finer)
        elif row.method == "half" and self.provider == CPU:
            store_half(graph, keep)
        elif row.method == "half":
            graph = compute_half(graph, keep)
        elif row.fixed_shapes:
            graph = quantize_for_npu(graph, self.feeds, keep=keep, bits=row.activation_bits)
        elif row.method == "static":
            graph = self._static(graph, row, found, factors, folded, keep)
        files = graph.write(folder)
        check_model(folder / MODEL)
        if self.provider == CPU or row.method != "half":  # a graph in float16 may need kernels that a CPU has not
            Session(folder / MODEL, threads=1)
        progress(len(found) + 1, len(found) + 1)
        size = sum((folder / name).stat().st_size for name in files)
        return {
            "files": files,
            "bytes": size,
            "recipe": row.name,
            "kept": sorted(keep),
            "finer": sorted(finer),
            "smoothed": {name: smoothing[name].exponent for name in factors},
            "tables": tables,
            "left_in_float": _left_in_float(graph),
            "bits_per_weight": 8 * size / weights,
        }

    def _smoothing(self, row: Recipe, found: Sequence[Unit], progress: Progress) -> dict[str, Smoothing]:
        """Factors of the units that get any. A unit that lost its first node to `keep` has another name than before."""
        if not row.smooth:
            return {}
        by_node = {
            node: self.factors(progress)[unit.name] for unit in units(self.graph.products()) for node in unit.nodes
        }
        return {unit.name: by_node[unit.name] for unit in found}

    def _static(
        self,
        graph: Graph,
        row: Recipe,
        found: Sequence[Unit],
        factors: dict[str, Floats],
        folded: Collection[str],
        keep: frozenset[str],
    ) -> Graph:
        """Smooth, take ranges, quantize. Ranges are those of the smoothed graph with nothing kept."""
        key = (row.calibrator, row.smooth)
        smooth_in_float(graph, found, factors, folded)
        if key not in self._ranges:
            self._ranges[key] = self._find_ranges(graph, row.calibrator)
        return quantize_static(graph, self._ranges[key], keep=keep, arch=self.arch)

    def _find_ranges(self, graph: Graph, how: str) -> Any:
        import tempfile

        with tempfile.TemporaryDirectory() as scratch:
            graph.write(Path(scratch))
            return find_ranges(graph, Path(scratch) / MODEL, self.feeds, how, self.threads)


def smooth_in_float(graph: Graph, found: Sequence[Unit], factors: dict[str, Floats], folded: Collection[str]) -> None:
    """Put factors into a float32 graph: activations divided (those of `folded` are), matrices multiplied."""
    for unit in found:
        factor = factors.get(unit.name)
        if factor is None:
            continue
        scaled = {}
        for product in unit.weights:
            weight = graph.matrix(product) * factor[:, None]
            name = f"{matrix_name(product, smoothed=True)}/float"
            scaled[product.weight] = graph.store(name, weight.T if product.transposed else weight)
        for value in unit.inputs:
            readers = [product for product in unit.products if product.input == value]
            source, nodes = (value, []) if unit.name in folded else smooth(graph, value, factor, readers)
            for number, product in enumerate(readers):
                node = next(node for node in graph.nodes if node.name == product.node)
                node.input[0], node.input[1] = source, scaled[product.weight]
                if number == 0 and nodes:
                    graph.replace({node.name: [*nodes, node]})


def _left_in_float(graph: Graph) -> dict[str, int]:
    """Operators that still read a large float32 matrix or kernel, with their numbers."""
    left: Counter[str] = Counter()
    for node in graph.nodes:
        read = [graph.stored[name] for name in node.input if name in graph.stored]
        if any(tensor.data_type == 1 and len(tensor.dims) > 1 and np.prod(tensor.dims) >= _LARGE for tensor in read):
            left[node.op_type] += 1
    return dict(sorted(left.items()))
