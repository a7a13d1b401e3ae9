"""The calibration text in two: most of it to choose, train and calibrate on, the end of it to judge candidates by.

What is judged on the evaluation text is the package alone; a choice between candidates is judged on text that none of
them has seen, and that is not the evaluation text either.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepack.errors import InputRefused, UsageError
from edgepack.worker import Progress, no_progress

if TYPE_CHECKING:
    from edgepack.workshop import Workshop

JUDGED_SHARE = 0.1
_LEAST_CHARACTERS = 20_000  # of the judged part: a dozen windows of 512 tokens
TRAINING, JUDGING = "training.txt", "judging.txt"


@dataclass(frozen=True)
class Parts:
    """Paths of both parts, in the store.

    Args:
        training: To choose, train and calibrate on.
        judging: To judge by.
    """

    training: Path
    judging: Path


def parts(shop: Workshop, model: Path, calibration: str | None) -> Parts:
    """Split a calibration text.

    Args:
        shop: Where the parts are kept.
        model: Folder of the model, for texts that need its chat template.
        calibration: As `--calibration`; None takes the text that ships.

    Raises:
        InputRefused: Too little text.
        UsageError: Text of chats, whose special tokens plain text can't keep.
    """
    from edgepack.calibrate.texts import resolve
    from edgepack.gguf.calibrated import digests
    from edgepack.worker import run
    from edgepack.workshop import keyed

    located = resolve(calibration)

    def make(folder: Path) -> None:
        arguments = {"text": located.as_json(), "model": str(model), "folder": str(folder)}
        run("edgepack.auto.parts:split", arguments, what="a look at the calibration text")

    entry = shop.store.step("text-parts", keyed({"text": digests(located), "share": JUDGED_SHARE}), make)
    return Parts(entry.files[TRAINING].path, entry.files[JUDGING].path)


def split(*, text: Mapping[str, Any], model: str, folder: str, progress: Progress = no_progress) -> dict[str, int]:
    """Write both parts, cut between paragraphs (worker function).

    Args:
        text: `Located.as_json`.
        model: Folder of the model.
        folder: Where to.
        progress: Not called.

    Returns:
        Characters of both.
    """
    from edgepack.calibrate.texts import calibration_text

    content = calibration_text(text, Path(model))
    if content.special:
        raise UsageError(
            f"--auto: {content.origin} holds chats, and --auto judges on plain text",
            hint="Give plain text with --calibration.",
        )
    wanted = int(len(content.text) * (1 - JUDGED_SHARE))
    border = re.compile(r"\n\s*\n").search(content.text, wanted)
    at = border.end() if border else wanted
    if len(content.text) - at < _LEAST_CHARACTERS:
        raise InputRefused(
            f"--auto: {content.origin} has {len(content.text):,} characters, expected about "
            f"{int(_LEAST_CHARACTERS / JUDGED_SHARE):,}: a tenth of it is kept to judge candidates by",
            hint="Give a longer text with --calibration.",
        )
    for name, part in ((TRAINING, content.text[:at]), (JUDGING, content.text[at:])):
        (Path(folder) / name).write_text(part, encoding="utf-8", newline="")
    return {TRAINING: at, JUDGING: len(content.text) - at}
