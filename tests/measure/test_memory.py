from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys

from edgepack.measure.machine import facts, machine
from edgepack.measure.memory import peak_rss_mb, rss_mb

TOUCH = """
from edgepack.measure.memory import peak_rss_mb, rss_mb
start = peak_rss_mb()
block = b"x" * 150_000_000
held = rss_mb()
del block
print(start, held, rss_mb(), peak_rss_mb())
"""


def test_the_peak_stays_after_the_memory_is_gone() -> None:
    # the parent is made larger than the child first: its peak must not be inherited
    ballast = b"y" * 300_000_000
    words = subprocess.run([sys.executable, "-c", TOUCH], capture_output=True, text=True, check=True).stdout.split()
    del ballast
    start, held, after, peak = map(float, words)
    assert start < 100
    assert held > start + 120
    assert after < held - 120
    assert peak >= held - 1


def test_resident_memory_is_at_most_its_peak() -> None:
    assert 0 < rss_mb() <= peak_rss_mb() + 1


def test_facts_say_what_decides_speed() -> None:
    found = facts()
    assert found["arch"] == platform.machine()
    assert found["kernel"] == platform.release()
    assert 1 <= found["cores"] <= (os.cpu_count() or 1)
    assert found["ram_mb"] > 500
    assert found["cpu"]
    assert None not in found.values()
    assert json.loads(json.dumps(found)) == found


def test_facts_name_neither_host_nor_path() -> None:
    words = set(re.findall(r"[\w.-]+", json.dumps(machine())))
    assert platform.node() not in words
    assert not any(value.startswith("/") for value in facts().values() if isinstance(value, str))


def test_the_runtime_is_named_with_its_commit() -> None:
    runtime = machine()["runtime"]
    assert runtime["llama_cpp_python"].startswith("0.3.")
    assert len(runtime["llama_cpp_commit"].split("-")[0]) >= 7
    assert "CPU" in runtime["system_info"]
