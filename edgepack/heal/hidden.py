"""Which layer of the teacher each layer of a pruned student was: `edgepack-prune.json` says.

A student that lost a quarter of its layers or more counts as cut hard (`HARD`).
"""

from __future__ import annotations

from pathlib import Path

HARD = 0.25  # share of the layers that are gone


def kept_layers(student: Path, layers: int, teacher_layers: int) -> tuple[int, ...] | None:
    """Numbers of the teacher's layers that a student still has, in its order; None where nothing says so.

    Args:
        student: Its folder.
        layers: It has.
        teacher_layers: Its teacher has.
    """
    from edgepack.prune.folder import read_sidecar

    kept = (read_sidecar(student) or {}).get("kept_layers")
    if not isinstance(kept, list) or len(kept) != layers:
        return None
    if not all(type(number) is int and 0 <= number < teacher_layers for number in kept):
        return None
    return tuple(kept)


def cut_hard(layers: int, teacher_layers: int) -> bool:
    """Whether so much depth is gone that hidden states may need a loss of their own."""
    return layers <= (1 - HARD) * teacher_layers


def pairs(kept: tuple[int, ...]) -> dict[int, int]:
    """Hidden state of the student -> that of the teacher: what each layer puts out; 0 is the embedding's."""
    return {place + 1: number + 1 for place, number in enumerate(kept)}
