"""A process that uses a store, for the tests to start in numbers and to kill.

    python store_process.py ROOT COMMAND [LOG]

Appends a line to LOG (atomic for short lines) for each time a step was really made.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from edgepack.store import Store

INPUTS = {"model": "ab" * 32, "preset": "Q4_0"}


def main():
    root, command = Path(sys.argv[1]), sys.argv[2]
    log = Path(sys.argv[3] if len(sys.argv) > 3 else os.devnull)

    def make(folder):
        with log.open("a") as file:
            file.write(f"made by {os.getpid()}\n")
        for number in range(4):
            (folder / f"{number}.bin").write_bytes(bytes([number]) * 50_000)
            time.sleep(0.02)

    def make_and_hang(folder):
        make(folder)
        time.sleep(60)

    store = Store(root)
    if command == "step":
        entry = store.step("export", INPUTS, make)
        for number in range(4):
            assert entry.files[f"{number}.bin"].path.read_bytes() == bytes([number]) * 50_000
    elif command == "hang":
        store.step("export", INPUTS, make_and_hang)
    elif command == "many":
        for number in range(5):
            store.step("export", {"number": number}, lambda folder: (folder / "x").write_bytes(os.urandom(100_000)))
    elif command == "clean":
        while True:
            Store(root).gc()
    elif command == "hold":
        store.step("export", INPUTS, make)
        print("holding", flush=True)
        time.sleep(60)
    print("ok", flush=True)


if __name__ == "__main__":
    main()
