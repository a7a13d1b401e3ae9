"""Put a finished folder in its place: built beside it, moved there by one rename.

`<parent>/.<name>.partial-<random>` is on the same file system as the output, so the rename can't fail half-way. What
was at the output stays there, untouched, until the new folder is whole. Does not know what is in the folder.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from edgepack import locks
from edgepack.errors import UsageError
from edgepack.files import discard, storage_errors, sync_folder, sync_tree

_PACKAGE_MARK = "edgepack.json"  # what `--force` may replace: a package, or an empty folder
_NAME_BYTES = 241  # file systems allow 255, and the temporary name is 14 longer
_PARTIAL = re.compile(r"\.(?P<name>.+)\.partial-[0-9a-f]{4}")


def publish(build: Callable[[Path], None], output: Path, *, force: bool = False) -> Path:
    """Build a folder and put it at `output`.

    Args:
        build: Fills the empty folder it gets.
        output: Where it goes; parents are created.
        force: Replace a package that is there, after the new one is whole. Anything else that is there stays.

    Returns:
        The absolute path of `output`.

    Raises:
        UsageError: `output` exists and `force` is not set, or is neither a package nor empty, or can't be made there.
        StorageError: The file system refused; `output` is as it was.
        Exception: Whatever `build` raised; nothing is left of the new folder and `output` is as it was.
    """
    output = Path(os.path.abspath(output))  # noqa: PTH100 (a link at `output` must be seen, not followed)
    created: list[Path] = []
    with storage_errors(output):
        _recover(output)
        check_output(output, force=force)
        created = [parent for parent in output.parents if not parent.exists()]
        output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with storage_errors(output):
            _publish(build, output, force)
    except BaseException:
        for parent in created:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
    return output


def check_output(output: Path, *, force: bool) -> None:
    """Refuse an output that `publish` would refuse: to be called before any work.

    Raises:
        UsageError: As `publish`; or its name is too long, or the place it would be made in is no folder or read-only.
    """
    if len(os.fsencode(output.name)) > _NAME_BYTES:
        raise UsageError(f"{output}: the name is longer than {_NAME_BYTES} bytes", hint="Choose a shorter one with -o.")
    if not os.path.lexists(output):
        _check_parent(output)
        return
    if not force:
        raise UsageError(f"{output} exists", hint="Choose another folder with -o; `build --force` replaces a package.")
    if output.is_symlink() or not output.is_dir():
        raise UsageError(f"{output} is not a folder, so --force does not replace it", hint="Choose another with -o.")
    if not (output / _PACKAGE_MARK).is_file() and any(output.iterdir()):
        raise UsageError(
            f"{output} holds no {_PACKAGE_MARK}, so --force does not replace it",
            hint="Choose another folder with -o, or remove it yourself.",
        )


def _check_parent(output: Path) -> None:
    """The nearest parent that exists must be a folder that can be written; what it lacks is made by `publish`."""
    parent = next(parent for parent in Path(os.path.abspath(output)).parents if os.path.lexists(parent))  # noqa: PTH100
    hint = "Choose another folder with -o."
    if not parent.is_dir():
        raise UsageError(f"{output}: {parent} is not a folder", hint=hint)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{output}: {parent} can't be written", hint=hint)


def published_place(path: Path) -> Path | None:
    """Where `path`, inside a folder that `publish` is building, will be; None for any other path."""
    path = path.absolute()
    for parent in path.parents:
        if match := _PARTIAL.fullmatch(parent.name):
            return parent.with_name(match["name"]) / path.relative_to(parent)
    return None


def _publish(build: Callable[[Path], None], output: Path, force: bool) -> None:
    partial, descriptor = locks.new_folder(lambda: output.with_name(f".{output.name}.partial-{os.urandom(2).hex()}"))
    try:
        build(partial)
        sync_tree(partial)
        check_output(output, force=force)  # hours may have passed
        _swap(partial, output)
    except BaseException:
        discard(partial)
        raise
    finally:
        os.close(descriptor)


def _swap(partial: Path, output: Path) -> None:
    if not os.path.lexists(output):
        _move(partial, output)
        return
    descriptor = locks.open_folder(output)
    try:
        locks.take(descriptor)  # `_recover` of another process leaves it alone while it is aside
        old = output.with_name(f".{output.name}.old-{os.urandom(2).hex()}")
        output.rename(old)
        try:
            _move(partial, output)
        except BaseException:
            old.rename(output)
            raise
        discard(old)  # what can't be removed now is removed by the next `publish`
    except locks.Busy as error:
        hint = "Wait for it, or choose another folder with -o."
        raise UsageError(f"{output} is being replaced by another process", hint=hint) from error
    finally:
        os.close(descriptor)


def _move(partial: Path, output: Path) -> None:
    partial.rename(output)
    try:
        sync_folder(output.parent)
    except BaseException:
        output.rename(partial)
        raise


def _recover(output: Path) -> None:
    """Clear up what a killed `publish` of the same output left: its partial folder, and an old package set aside."""
    if not output.parent.is_dir():
        return
    name = re.escape(output.name)
    left = [
        path for path in output.parent.iterdir() if re.fullmatch(rf"\.{name}\.(partial|old)-[0-9a-f]{{4}}", path.name)
    ]
    for path in left:
        descriptor = locks.abandoned(path)
        if descriptor is not None:
            if ".old-" in path.name[-9:] and not os.path.lexists(output):
                path.rename(output)
            else:
                discard(path)
            os.close(descriptor)
