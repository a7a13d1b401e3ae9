"""Functions found by kind and name."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, EntryPoints

import pytest

from edgepack import plugins
from edgepack.backend import Backend
from edgepack.errors import UsageError


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two entry points: a new device, and one that wants to be `ssh`."""
    entries = EntryPoints(EntryPoint(name, "json:dumps", "edgepack.device") for name in ("telnet", "ssh"))
    monkeypatch.setattr(plugins, "entry_points", lambda **wanted: entries.select(**wanted))


def test_every_built_in_device_is_a_function_and_every_format_has_the_functions_of_a_backend() -> None:
    asked = {name for name in vars(Backend) if not name.startswith("_")}
    for kind, name in plugins.BUILT_IN:
        found = plugins.load(kind, name)
        assert callable(found) if kind == "device" else asked <= set(vars(found))


def test_asking_for_names_imports_nothing() -> None:
    before = set(sys.modules)
    assert "ssh" in plugins.names("device")
    assert {name for name in set(sys.modules) - before if name.startswith("edgepack")} == set()


def test_an_entry_point_adds_a_name(installed: None) -> None:
    import json

    assert plugins.load("device", "telnet") is json.dumps


def test_an_entry_point_can_not_take_a_built_in_name(installed: None) -> None:
    assert plugins.load("device", "ssh").__module__ == "edgepack.devices.ssh"


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match="no device 'shs'") as refused:
        plugins.load("device", "shs")
    assert "ssh" in str(refused.value.hint)
