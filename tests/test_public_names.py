"""What `import edgepack` offers."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import edgepack


def test_every_public_name_is_there_and_stays_what_it_is_when_submodules_are_imported() -> None:
    code = (
        "import pkgutil, importlib, edgepack\n"
        "for m in pkgutil.iter_modules(edgepack.__path__):\n"
        "    if not m.name.endswith('_child'): importlib.import_module('edgepack.' + m.name)\n"
        "print([n for n in edgepack.__all__ if type(getattr(edgepack, n)).__name__ not in ('function', 'type')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_no_module_has_the_name_of_a_public_function() -> None:
    assert {module.name for module in pkgutil.iter_modules(edgepack.__path__)} & set(edgepack.__all__) == set()


def test_importing_edgepack_imports_nothing_of_it() -> None:
    code = "import sys, edgepack; print([m for m in sys.modules if m.startswith('edgepack.')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    assert not hasattr(edgepack, "biuld")
