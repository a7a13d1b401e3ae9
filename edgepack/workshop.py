"""What every step of a build works with: the store that keeps results, threads, and what the machine has.

A result is found again when source files, options, edgepack's own code and the toolchain are the same. Results that
are files (the artifact) are store entries; results that are numbers are a `result.json` in one. Knows no format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepack.errors import InputRefused
from edgepack.events import Listener
from edgepack.toolchain import code_digest, versions

if TYPE_CHECKING:
    from edgepack.source import Source
    from edgepack.store import Entry, Store


@dataclass(frozen=True)
class Workshop:
    """What every step needs: where results are kept and who is told.

    Args:
        store: The content-addressed store.
        listener: Told about steps and progress.
        threads: Threads to compute with.
        fresh: Measure again whatever the store holds.
        evaluation: The text that fidelity will be measured on: nothing may be tuned on it.
    """

    store: Store
    listener: Listener
    threads: int
    fresh: bool = False
    evaluation: Path | None = None

    def remember(self, name: str, inputs: Mapping[str, Any], compute: Callable[[], Any]) -> tuple[Any, bool]:
        """The result of `compute` for these inputs, from the store if it is there.

        Returns:
            The JSON value and whether it came from the store.
        """
        if self.fresh:
            return compute(), False

        def make(folder: Path) -> None:
            (folder / "result.json").write_text(json.dumps(compute()), encoding="utf-8")

        entry = self.store.step(name, keyed(inputs), make)
        return json.loads((entry.files["result.json"].path).read_text(encoding="utf-8")), entry.cached


def keyed(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of a step with all that may change its result without being one: code and versions."""
    return dict(inputs) | {"code": code_digest(), "toolchain": versions()}


def physical_cores() -> int:
    """Cores this process may run on, counting two hardware threads of one core once (Linux; elsewhere all CPUs)."""
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:
        return os.cpu_count() or 1
    siblings = set()
    for cpu in allowed:
        listing = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(listing.read_text().strip() if listing.is_file() else str(cpu))
    return len(siblings) or 1


@dataclass(frozen=True)
class Exported:
    """The files of an artifact in the store.

    Args:
        entry: The store entry that holds them.
        files: Which of the entry's files go into the package's `model/`.
        main: The file the runtime opens.
        report: What the exporter says of them: `bits_per_weight`, `types`, ...
    """

    entry: Entry
    files: tuple[str, ...]
    main: str
    report: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """Where the main file is."""
        return self.entry.files[self.main].path

    @property
    def digest(self) -> str:
        """Stands for the bytes of all files."""
        return "+".join(self.entry.files[name].sha256 for name in sorted(self.files))

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.entry.files[name].size for name in self.files)


def machine_facts() -> dict[str, Any]:
    """Facts of this machine and its runtimes at this moment, kept with what is measured now."""
    from edgepack.worker import run

    return dict(run("edgepack.measure.machine:machine", {}, what="a look at the machine"))


def stamps(source: Source) -> dict[str, tuple[int, int, int]]:
    """Size, modification time and inode of every source file: cheap witnesses that nobody wrote to it meanwhile."""
    places = {
        name: source.path / name if source.path.is_dir() else source.path.with_name(name) for name in source.files
    }
    status = {name: place.stat() for name, place in places.items()}
    return {name: (found.st_size, found.st_mtime_ns, found.st_ino) for name, found in status.items()}


def refuse_changed(source: Source, before: Mapping[str, tuple[int, int, int]]) -> None:
    """What was exported must be what was hashed: a source that changes under the build is refused."""
    changed = [name for name, stamp in stamps(source).items() if stamp != before[name]]
    if changed:
        raise InputRefused(
            f"{source.name}: {changed[0]} changed while the model was exported",
            hint="Build again when nobody writes to it.",
        )


def available_memory_bytes() -> int:
    """Memory that can be used without swapping (Linux MemAvailable; elsewhere half of the physical memory)."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def sha256(path: str | Path) -> str:
    """The sha256 of a file, in hex."""
    from edgepack.files import sha256_of

    return sha256_of(Path(path))
