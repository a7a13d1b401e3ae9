"""Quantize an exported encoder: one float32 graph in, one quantized graph out.

The same graph, recipe, calibration data and toolchain give the same bytes. What the recipes are is in `recipes.py`;
which one to take, and which nodes to treat better, is `search.py`'s business. Runs in a worker process only.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgepack.errors import StepError, UsageError
from edgepack.onnx.blocks import quantize_blocks
from edgepack.onnx.calibrate import Feeds, activations, open_session, read_feeds
from edgepack.onnx.dynamic import quantize_products, smooth
from edgepack.onnx.embeddings import quantize_tables
from edgepack.onnx.export import MODEL
from edgepack.onnx.half import compute_half, store_half
from edgepack.onnx.integers import Floats
from edgepack.onnx.recipes import RECIPES, Recipe, recipe as recipe_named
from edgepack.onnx.rewrite import Graph, known_nodes, read_graph
from edgepack.onnx.smoothing import Smoothing, choose_factor
from edgepack.onnx.units import Unit, units
from edgepack.worker import Progress

__all__ = ["RECIPES", "Factors", "find_factors", "quantize", "write_quantized"]

CALIBRATION_SAMPLES = 64  # sentences; twice as many changed no figure of all-MiniLM-L6-v2 in the fourth digit
CPU = "CPUExecutionProvider"
QNN = "QNNExecutionProvider"

Factors = dict[str, Smoothing]


def quantize(
    *,
    model: str,
    folder: str,
    recipe: str,
    calibration: str | None = None,
    keep: Sequence[str] = (),
    twice: Sequence[str] = (),
    arch: str = "x86_64",
    provider: str = CPU,
    source: str | None = None,
    progress: Progress,
) -> dict[str, Any]:
    """Quantize an encoder.

    Args:
        model: Folder with the float32 export, model.onnx.
        folder: An existing folder for the result.
        recipe: Name of a row of `RECIPES`.
        calibration: Text, folder of images, or .npz, for recipes that need data; see `calibrate.read_feeds`.
        keep: Names of nodes that stay in float32.
        twice: Names of nodes whose activations get 16 bits by a second 8-bit product (`dynamic.py`); of a recipe
            with method `dynamic` only.
        arch: `x86_64`: weights that can't saturate AVX2's 16-bit sums. `arm64`: no such limit, symmetric activations.
        provider: Execution provider of onnxruntime that will run it.
        source: Folder with tokenizer.json or the image processor; None: `model`.
        progress: Called with (parts done, parts); a part is a unit calibrated or a pass over the graph.

    Returns:
        `files`, `bytes`, `recipe`, `kept`, `twice`, `smoothed` (node -> exponent), `tables` (embeddings quantized),
        `left_in_float` (operator -> number of nodes with float32 weights), `bits_per_weight`.

    Raises:
        UsageError: Unknown recipe, node or architecture; calibration data missing; free axes where none may be.
        InputRefused: The graph or the data is not what it should be; weights that are not finite.
        StepError: onnxruntime can't quantize the graph.
    """
    row = recipe_named(recipe)
    if arch not in ("x86_64", "arm64"):
        raise UsageError(f"arch = {arch!r}: expected x86_64 or arm64")
    if row.needs_calibration and calibration is None:
        raise UsageError(
            f"quantize = {recipe!r} needs calibration data, and none was given",
            hint="Give a text or a folder of images with --calibration, or use int8-dynamic, which needs none.",
        )
    if twice and row.method != "dynamic":
        raise UsageError(f"quantize = {recipe!r}: only int8 and int8-dynamic can multiply twice")
    graph = read_graph(Path(model))
    known_nodes(graph, [*keep, *twice], "keep")
    feeds: Feeds = []
    if row.needs_calibration:
        inputs = open_session(Path(model) / MODEL, 1).get_inputs()
        assert_fixed(row, inputs)
        feeds = read_feeds(str(calibration), Path(source or model), inputs, CALIBRATION_SAMPLES)
    factors: Factors = {}
    found = units(graph.products(), keep)
    if row.smooth:
        pair_safe = row.method == "dynamic" and arch == "x86_64"
        factors = find_factors(Path(model), graph, found, feeds, pair_safe=pair_safe, progress=progress)
    return write_quantized(
        graph,
        Path(folder),
        row,
        keep=frozenset(keep),
        twice=frozenset(twice),
        factors=factors,
        feeds=feeds,
        arch=arch,
        provider=provider,
    )


def assert_fixed(row: Recipe, inputs: Sequence[Any]) -> None:
    """Refuse free axes where the recipe's runtime has none.

    Raises:
        UsageError: An input has a free axis.
    """
    free = [port.name for port in inputs if not all(isinstance(axis, int) for axis in port.shape)]
    if row.fixed_shapes and free:
        raise UsageError(
            f"quantize = {row.name!r} is for processors that need fixed shapes; {', '.join(free)} has free axes",
            hint="Fix them when exporting: give batch and sequence.",
        )


def find_factors(
    path: Path, graph: Graph, found: Sequence[Unit], feeds: Feeds, *, pair_safe: bool, progress: Progress
) -> Factors:
    """Choose smoothing factors for every unit, from what flows into it.

    Args:
        path: Folder of the graph in float32.
        graph: The same in memory.
        found: Units.
        feeds: Calibration data.
        pair_safe: As the weights will be quantized.
        progress: In units.
    """
    wanted = {value: unit for unit in found for value in unit.inputs}
    chosen: Factors = {}
    samples: dict[str, list[Floats]] = {}
    for value, arrays in activations(path / MODEL, list(wanted), feeds):
        unit = wanted[value]
        samples.setdefault(unit.name, []).extend(arrays)
        if value == unit.inputs[-1]:
            weight = np.concatenate([graph.matrix(product) for product in unit.weights], axis=1)
            chosen[unit.name] = choose_factor(samples.pop(unit.name), weight, pair_safe=pair_safe)
            progress(len(chosen), len(found))
    return chosen


def write_quantized(
    graph: Graph,
    folder: Path,
    row: Recipe,
    *,
    keep: frozenset[str] = frozenset(),
    twice: frozenset[str] = frozenset(),
    factors: Factors | None = None,
    feeds: Feeds = (),  # type: ignore[assignment]
    arch: str = "x86_64",
    provider: str = CPU,
) -> dict[str, Any]:
    """Carry out a recipe on a graph in memory, which it changes, and write the result.

    Args:
        graph: The float32 graph.
        folder: Where it goes.
        row: The recipe.
        keep: Nodes left in float32.
        twice: Nodes multiplied twice; their units are not smoothed, which 16 bits don't need.
        factors: Smoothing by unit name.
        feeds: Calibration data, for static recipes.
        arch: As in `quantize`.
        provider: As in `quantize`.

    Returns:
        As `quantize`.
    """
    weights = sum(int(np.prod(tensor.dims)) for tensor in graph.stored.values())
    found = units(graph.products(), keep)
    doubled = {unit.name for unit in found if twice.intersection(unit.nodes)}
    smoothing = {
        name: one for name, one in (factors or {}).items() if one.factor is not None and name not in doubled
    }
    by_unit = {name: one.factor for name, one in smoothing.items() if one.factor is not None}
    tables: list[str] = []
    if row.table_bits <= 8:
        tables = quantize_tables(graph, bits=row.table_bits, block=row.block, keep=keep)
    if row.method == "dynamic":
        quantize_products(graph, found, factors=by_unit, twice=doubled, pair_safe=arch == "x86_64")
    elif row.method == "blocks":
        chosen = [product for product in graph.products() if product.node not in keep]
        quantize_blocks(graph, chosen, bits=row.weight_bits, block=row.block)
    elif row.method == "half" and provider == CPU:
        store_half(graph, keep)
    elif row.method == "half":
        graph = compute_half(graph, keep)
    elif row.method == "static":
        from edgepack.onnx.static import quantize_static

        _smooth_in_float(graph, found, by_unit)
        graph = quantize_static(graph, row, feeds, keep=keep, arch=arch, npu=provider == QNN or row.fixed_shapes)
    left = _left_in_float(graph)
    files = graph.write(folder)
    _loads(folder / MODEL, row, provider)
    size = sum((folder / name).stat().st_size for name in files)
    return {
        "files": files,
        "bytes": size,
        "recipe": row.name,
        "kept": sorted(keep),
        "twice": sorted(itertools.chain.from_iterable(unit.nodes for unit in found if unit.name in doubled)),
        "smoothed": {name: one.exponent for name, one in smoothing.items()},
        "tables": tables,
        "left_in_float": left,
        "bits_per_weight": 8 * size / weights,
    }


def _smooth_in_float(graph: Graph, found: Sequence[Unit], factors: dict[str, Floats]) -> None:
    """Put factors into a float32 graph: activations divided, matrices multiplied."""
    for unit in found:
        factor = factors.get(unit.name)
        if factor is None:
            continue
        scaled = {}
        for product in unit.weights:
            name = product.weight + ("/transposed" if product.transposed else "") + "/smoothed"
            weight = graph.matrix(product) * factor[:, None]
            scaled[product.weight] = graph.store(name, weight.T if product.transposed else weight)
        for value in unit.inputs:
            readers = [product for product in unit.products if product.input == value]
            source, nodes = smooth(graph, value, factor, readers)
            for number, product in enumerate(readers):
                node = next(node for node in graph.nodes if node.name == product.node)
                node.input[0], node.input[1] = source, scaled[product.weight]
                if number == 0 and nodes:
                    graph.replace({node.name: [*nodes, node]})


def _left_in_float(graph: Graph) -> dict[str, int]:
    """Operators that still read a float32 matrix or kernel, with their numbers."""
    left: Counter[str] = Counter()
    for node in graph.nodes:
        large: Collection[Any] = [
            name for name in node.input if name in graph.stored and len(graph.stored[name].dims) > 1
        ]
        if any(graph.stored[name].data_type == 1 and np.prod(graph.stored[name].dims) >= 1024 for name in large):
            left[node.op_type] += 1
    return dict(sorted(left.items()))


def _loads(path: Path, row: Recipe, provider: str) -> None:
    """Load the result where this machine can: in onnxruntime's CPU provider."""
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, InvalidGraph, NotImplemented

    if provider != CPU and row.method == "half":
        return  # a graph in float16 that a CPU may have no kernels for
    try:
        open_session(path, 1)
    except (Fail, InvalidArgument, InvalidGraph, NotImplemented) as error:
        raise StepError(f"{row.name}: onnxruntime can't load the result: {' '.join(str(error).split())[:300]}") from None
