"""A package appears whole or not at all, and what was there before is not lost."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgepack.errors import StepError, UsageError
from edgepack.publish import check_output, publish, published_place

ROOT = Path(__file__).parent.parent


def package(text):
    def build(folder):
        (folder / "model").mkdir()
        (folder / "model/m.gguf").write_text(text)
        (folder / "edgepack.json").write_text("{}")

    return build


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_the_folder_is_built_beside_and_moved(tmp_path):
    seen = []

    def build(folder):
        seen.append(folder)
        assert not (tmp_path / "out").exists()
        package("new")(folder)

    assert publish(build, tmp_path / "out") == tmp_path / "out"
    assert seen[0].parent == tmp_path
    assert seen[0].name.startswith(".out.partial-")
    assert tree(tmp_path) == ["out", "out/edgepack.json", "out/model", "out/model/m.gguf"]
    assert published_place(seen[0] / "model/m.gguf") == tmp_path / "out/model/m.gguf"
    assert published_place(tmp_path / "out/model/m.gguf") is None


def test_an_existing_output_is_named_with_the_way_out(tmp_path):
    publish(package("old"), tmp_path / "out")
    with pytest.raises(UsageError, match=f"{tmp_path}/out exists") as caught:
        publish(package("new"), tmp_path / "out")
    assert "--force" in caught.value.hint
    assert (tmp_path / "out/model/m.gguf").read_text() == "old"


def test_force_replaces_a_package_and_an_empty_folder(tmp_path):
    publish(package("old"), tmp_path / "out")
    (tmp_path / "out/extra").write_text("")
    publish(package("new"), tmp_path / "out", force=True)
    (tmp_path / "empty").mkdir()
    publish(package("new"), tmp_path / "empty", force=True)
    assert tree(tmp_path / "out") == tree(tmp_path / "empty") == ["edgepack.json", "model", "model/m.gguf"]
    assert (tmp_path / "out/model/m.gguf").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "out"]


@pytest.mark.parametrize("kind", ["home", "file", "link", "dangling"])
def test_force_replaces_nothing_that_is_no_package(tmp_path, kind):
    output = tmp_path / "out"
    if kind == "home":
        output.mkdir()
        (output / "thesis.tex").write_text("x")
    elif kind == "file":
        output.write_text("x")
    elif kind == "link":
        publish(package("old"), tmp_path / "elsewhere")
        output.symlink_to(tmp_path / "elsewhere")
    else:
        output.symlink_to(tmp_path / "nowhere")
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="--force does not replace it"):
        publish(package("new"), output, force=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("error", [StepError("no"), KeyboardInterrupt(), SystemExit(143), OSError(28, "No space")])
def test_a_failed_build_leaves_everything_as_it_was(tmp_path, error, force):
    if force:
        publish(package("old"), tmp_path / "a/b/out")
    before = tree(tmp_path)

    def build(folder):
        package("half")(folder)
        raise error

    expected = StepError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        publish(build, tmp_path / "a/b/out", force=force)
    assert tree(tmp_path) == before


def test_an_output_that_appears_during_the_build_is_not_overwritten(tmp_path):
    def build(folder):
        package("mine")(folder)
        publish(package("theirs"), tmp_path / "out")

    with pytest.raises(UsageError, match="exists"):
        publish(build, tmp_path / "out")
    assert (tmp_path / "out/model/m.gguf").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_process_left_is_cleared_and_a_living_one_is_left_alone(tmp_path):
    code = "import os, sys, pathlib, edgepack.publish as p; p.publish(lambda f: os._exit(9), pathlib.Path(sys.argv[1]))"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], cwd=ROOT).returncode == 9
    (stale,) = tmp_path.iterdir()
    (tmp_path / ".other.partial-0000").mkdir()
    (tmp_path / ".out.partial-notours").mkdir()

    def build(folder):
        assert not stale.exists()
        publish(package("inner"), tmp_path / "out")  # must not clear the outer one's folder away
        assert folder.exists()
        raise StepError("stop")

    with pytest.raises(StepError):
        publish(build, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.partial-0000", ".out.partial-notours", "out"]


def test_an_old_package_set_aside_by_a_killed_process_comes_back(tmp_path):
    publish(package("old"), tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.old-0a1b")
    with pytest.raises(UsageError, match="exists"):
        publish(package("new"), tmp_path / "out")
    assert (tmp_path / "out/model/m.gguf").read_text() == "old"


@pytest.mark.parametrize(
    "name", ["with space", "ünï-模型-😀", "-leading-dash", ".hidden", "x" * 240, "a.partial-00ff", "[x]*?"]
)
def test_unusual_names_work(tmp_path, name):
    encoded = name if len(os.fsencode(name)) <= 241 else name[:60]
    output = publish(package("x"), tmp_path / encoded)
    publish(package("y"), output, force=True)
    assert [path.name for path in tmp_path.iterdir()] == [encoded]
    assert (output / "model/m.gguf").read_text() == "y"


def test_a_name_that_is_too_long_is_told_before_any_work(tmp_path):
    with pytest.raises(UsageError, match="longer than 241 bytes"):
        publish(lambda folder: pytest.fail("built"), tmp_path / ("x" * 250))


def test_the_early_check_agrees(tmp_path):
    check_output(tmp_path / "out", force=False)
    publish(package("old"), tmp_path / "out")
    check_output(tmp_path / "out", force=True)
    with pytest.raises(UsageError):
        check_output(tmp_path / "out", force=False)


@pytest.mark.parametrize("output", ["file/package", "file/deeper/package", "x" * 250])
def test_a_place_where_no_folder_can_be_is_told_before_any_work(tmp_path, output):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError) as caught:
        check_output(tmp_path / output, force=False)
    assert "is not a folder" in caught.value.message or "longer than" in caught.value.message
    assert "-o" in caught.value.hint


def test_a_place_that_can_not_be_written_is_told_before_any_work(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: bool(asked.append((path, mode))))  # root may write anywhere
    with pytest.raises(UsageError, match=f"{tmp_path} can't be written"):
        check_output(tmp_path / "a/b", force=False)
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]
