"""`verify` names every way in which a package is not what its manifest says."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from making import make

from edgepack.canonical import canonical_json
from edgepack.errors import InputRefused, UsageError
from edgepack.package import read_package, verify
from edgepack.package.manifest import artifact_digest, package_digest

ROOT = Path(__file__).parent.parent.parent
GOLDEN = sorted(path for path in (Path(__file__).parent / "golden").iterdir() if path.is_dir())
MODEL = "model/tiny-llama-5m-Q4_K_M.gguf"


@pytest.fixture
def package(tmp_path):
    return make(tmp_path / "p").path


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A package that a test changes and puts back."""
    return make(tmp_path_factory.mktemp("shared") / "p").path


def problems(path: Path) -> list[str]:
    found = verify(path)
    assert found.whole == (not found.problems)
    assert all("\n" not in problem and len(problem) < 400 for problem in found.problems)
    return list(found.problems)


def rewritten(path: Path, change) -> list[str]:
    """The problems after `change` was made to the manifest and everything that follows from it was made to agree."""
    manifest = json.loads((path / "edgepack.json").read_bytes())
    change(manifest)
    with_digests = manifest
    try:
        with_digests["artifact_digest"] = artifact_digest(manifest["files"])
        with_digests["package_digest"] = package_digest(manifest)
    except (KeyError, TypeError, AttributeError, ValueError):
        pass
    (path / "edgepack.json").write_bytes(json.dumps(with_digests).encode())
    return problems(path)


# What happens to files


def test_a_whole_package_has_no_problems(package):
    found = verify(package)
    assert found.problems == ()
    assert found.files == 10
    assert found.package_digest == read_package(package).package_digest
    found.require()


def test_a_missing_file_is_named(package):
    (package / MODEL).unlink()
    (package / "model" / "x.gguf").write_bytes(b"")
    assert f"{MODEL}: missing" in problems(package)


def test_an_extra_file_is_named(package):
    (package / "model" / "extra.gguf").write_bytes(b"x")
    assert problems(package) == ["model/extra.gguf: extra, the manifest does not list it"]


@pytest.mark.parametrize("name", [".hidden", ".gitattributes", "model/.DS_Store", "new\nline", "\udcff", "bidi\u202e"])
def test_an_extra_file_of_any_name_is_named_on_one_line(name, package):
    (package / name).write_bytes(b"x")
    assert len(problems(package)) == 1


@pytest.mark.parametrize("name", [".git", "model/empty"])
def test_an_empty_folder_is_named(name, package):
    (package / name).mkdir()
    assert problems(package) == [f"{name}: an empty folder"]


def test_a_truncated_file_is_named_with_both_sizes(package):
    os.truncate(package / MODEL, 100)
    assert problems(package) == [f"{MODEL}: changed: 100 bytes, the manifest says 516"]


def test_a_symbolic_link_is_refused_though_its_content_is_right(package, tmp_path):
    shutil.move(package / MODEL, tmp_path / "m")
    (package / MODEL).symlink_to(tmp_path / "m")
    assert problems(package) == [f"{MODEL}: a symbolic link, expected a regular file"]


def test_a_linked_folder_is_refused_and_not_entered(package, tmp_path):
    shutil.move(package / "model", tmp_path / "elsewhere")
    (package / "model").symlink_to(tmp_path / "elsewhere")
    found = problems(package)
    assert "model: a symbolic link, expected a regular file" in found
    assert f"{MODEL}: missing" in found


def test_a_loop_of_links_ends(package):
    (package / "model" / "loop").symlink_to(package)
    assert problems(package)[0] == "model/loop: a symbolic link, expected a regular file"


@pytest.mark.parametrize("name", [MODEL, "edgepack.json", "SHA256SUMS"])
def test_a_hard_link_is_refused(name, package, tmp_path):
    os.link(package / name, tmp_path / "other")
    assert problems(package) == [f"{name}: has 2 hard links, expected 1: another name can change it"]


def test_a_fifo_is_named_and_does_not_hang(package):
    (package / MODEL).unlink()
    os.mkfifo(package / MODEL)
    assert problems(package) == [f"{MODEL}: a FIFO, expected a regular file"]


def test_a_socket_is_named(package, monkeypatch):
    monkeypatch.chdir(package)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("model/s")
    assert problems(package)[0] == "model/s: a socket, expected a regular file"


@pytest.mark.parametrize(
    ("name", "mode"), [(MODEL, 0o755), (MODEL, 0o666), (MODEL, 0o4644), ("model", 0o777), ("model", 0o1755)]
)
def test_an_odd_mode_is_named(name, mode, package):
    (package / name).chmod(mode)
    assert problems(package) == [f"{name}: has mode {mode:04o}"]


@pytest.mark.parametrize(
    ("file_mode", "folder_mode"), [(0o600, 0o700), (0o664, 0o775), (0o444, 0o555), (0o644, 0o2755)]
)
def test_modes_of_ordinary_copies_are_fine(file_mode, folder_mode, package):
    for path in package.rglob("*"):
        path.chmod(folder_mode if path.is_dir() else file_mode)
    assert problems(package) == []
    for path in package.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def test_a_package_reached_through_a_link_is_fine(package, tmp_path):
    (tmp_path / "current").symlink_to(package)
    assert problems(tmp_path / "current") == []


def test_what_is_no_folder_is_wrong_usage(tmp_path):
    for path, says in ((tmp_path / "none", "no such folder"), (Path(__file__), "a file, expected a package folder")):
        with pytest.raises(UsageError, match=says):
            verify(path)


def test_a_folder_that_is_no_package_says_so(tmp_path):
    assert problems(tmp_path) == ["edgepack.json: missing: this is no package"]


# Bits


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_flipped_bit_in_any_file_is_noticed_and_the_file_named(shared, data):
    files = sorted(path for path in shared.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    content = path.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    bit = data.draw(st.integers(0, 7))
    path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
    try:
        found = problems(shared)
    finally:
        path.write_bytes(content)
    assert found
    name = str(path.relative_to(shared))
    assert any(name in problem for problem in found), (name, found)
    assert problems(shared) == []


def test_every_single_byte_of_the_sums_matters(shared):
    path = shared / "SHA256SUMS"
    content = path.read_bytes()
    try:
        for at in range(0, len(content), 7):
            path.write_bytes(content[:at] + content[at + 1 :])
            assert problems(shared), at
        for other in (content + b"\n", content.upper(), content.replace(b"\n", b"\r\n"), b"", b"x" * 1000, content * 2):
            path.write_bytes(other)
            assert problems(shared)[0].startswith("SHA256SUMS: disagrees with edgepack.json")
    finally:
        path.write_bytes(content)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300))
def test_any_bytes_for_a_manifest_end_in_problems(shared, content):
    path = shared / "edgepack.json"
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        assert problems(shared)
        with pytest.raises(InputRefused):
            read_package(shared)
    finally:
        path.write_bytes(before)


# Manifests that lie


def test_sums_that_agree_with_a_changed_file_do_not_help(package):
    import hashlib

    (package / MODEL).write_bytes(b"GGUF evil")
    sums = (package / "SHA256SUMS").read_text().splitlines()
    sums = [f"{hashlib.sha256(b'GGUF evil').hexdigest()}  {MODEL}" if line.endswith(MODEL) else line for line in sums]
    (package / "SHA256SUMS").write_text("\n".join(sums) + "\n")
    found = problems(package)
    assert f"{MODEL}: changed: 9 bytes, the manifest says 516" in found
    assert f"SHA256SUMS: disagrees with edgepack.json on {MODEL}" in found


@pytest.mark.parametrize("key", ["artifact_digest", "package_digest"])
def test_a_digest_that_does_not_follow_is_named(key, package):
    manifest = json.loads((package / "edgepack.json").read_bytes())
    manifest[key] = "sha256:" + "0" * 64
    (package / "edgepack.json").write_bytes(canonical_json(manifest))
    assert any(problem.startswith(f"edgepack.json: {key} is sha256:0000") for problem in problems(package))


def test_a_better_verdict_than_the_evidence_is_named(package):
    found = rewritten(package, lambda manifest: manifest.update(verdict="fail"))
    assert "evidence/validation.json: verdict 'pass', the manifest says 'fail'" in found


def test_a_manifest_of_a_newer_schema_says_to_upgrade(package):
    found = rewritten(package, lambda manifest: manifest.update(schema_version=2))
    assert found == ["edgepack.json: schema_version 2 is newer than this edgepack reads (1): upgrade edgepack"]
    with pytest.raises(InputRefused, match="upgrade edgepack"):
        read_package(package)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../evil", "is no file name"),
        ("model/../../evil", "is no file name"),
        ("/etc/passwd", "is an absolute path"),
        ("model//x", "is no file name"),
        ("model/./x", "is no file name"),
        ("C:x", "holds ':'"),
        ("model\\x", "holds '\\\\'"),
        ("a\nb", "holds '\\n'"),
        ("a\0b", "holds '\\x00'"),
        ("x\u202e", "holds '\\u202e'"),
        ("-rf", "starts or ends"),
        ("nul.txt", "device name"),
        ("a/b/c/d/e", "too deep"),
        ("a" * 300, "longer than"),
        ("", "is no file name"),
        ("edgepack.json", "does not list itself"),
        ("SHA256SUMS", "does not list itself"),
    ],
)
def test_a_hostile_path_in_a_manifest_is_named_and_never_opened(path, reason, package):
    def change(manifest):
        manifest["files"].append({"path": path, "size": 1, "sha256": "0" * 64})

    found = rewritten(package, change)
    assert len(found) == 1
    assert "files[10]" in found[0] and reason in found[0]


def test_duplicate_entries_are_named(package):
    assert "edgepack.json: files: README.md is listed twice" in rewritten(
        package, lambda m: m["files"].append(next(r for r in m["files"] if r["path"] == "README.md"))
    )


def test_entries_that_differ_in_case_only_are_named(package):
    found = rewritten(package, lambda m: m["files"].append({"path": "readme.MD", "size": 1, "sha256": "0" * 64}))
    assert "edgepack.json: files: README.md and readme.MD differ in case only" in found


def test_duplicate_keys_are_refused(package):
    text = (package / "edgepack.json").read_text()
    (package / "edgepack.json").write_text(text[:-1] + ',"verdict":"pass"}')
    assert "duplicate key 'verdict'" in problems(package)[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(files={}),
        lambda m: m.update(files=[1]),
        lambda m: m.update(files=[{"path": 1, "size": 1, "sha256": "0" * 64}]),
        lambda m: m["files"][0].update(size=-1),
        lambda m: m["files"][0].update(size=True),
        lambda m: m["files"][0].update(size=10**30),
        lambda m: m["files"][0].update(sha256="0" * 63),
        lambda m: m["files"][0].update(sha256="A" * 64),
        lambda m: m["files"][0].update(more=1),
        lambda m: m.update(artifact="README.md"),
        lambda m: m.update(artifact="../x"),
        lambda m: m.update(verdict="great"),
        lambda m: m.update(verdict=["pass"]),
        lambda m: m.update(schema_version="1"),
        lambda m: m.update(schema_version=True),
        lambda m: m.update(schema_version=0),
        lambda m: m.pop("target"),
        lambda m: m.update(overrides=[1]),
        lambda m: m.update(recipe={"x": 10**30}),
        lambda m: m.update(name="\ud800"),
        lambda m: m.update(files=[{"path": f"f{i}", "size": 1, "sha256": "0" * 64} for i in range(10_001)]),
    ],
)
def test_a_malformed_manifest_is_named_by_key_and_not_read(change, package):
    assert rewritten(package, change)[0].startswith("edgepack.json: ")
    with pytest.raises(InputRefused, match=r"edgepack\.json"):
        read_package(package)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 50_000, "[]", "null", "1e999", '{"schema_version":NaN}', "9" * 100_000]
)
def test_hostile_json_ends_in_one_sentence(text, package):
    (package / "edgepack.json").write_text(text)
    assert problems(package)[0].startswith("edgepack.json: ")


def test_a_huge_manifest_is_not_read(package):
    with (package / "edgepack.json").open("wb") as file:
        file.truncate(1 << 34)
    start = time.perf_counter()
    assert problems(package) == ["edgepack.json: larger than 16,777,216 bytes"]
    with pytest.raises(InputRefused, match="17,179,869,184 bytes"):
        read_package(package)
    assert time.perf_counter() - start < 2


def test_huge_sums_are_not_read_whole(package):
    with (package / "SHA256SUMS").open("wb") as file:
        file.truncate(1 << 26)
    assert problems(package)[0].startswith("SHA256SUMS: disagrees")


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"measurements":{}}', '{"measurements":[1]}', '{"measurements":[{"name":1}]}', "{"]
)
def test_malformed_evidence_is_refused(text, package):
    (package / "evidence" / "validation.json").write_text(text)
    with pytest.raises(InputRefused, match=r"validation\.json"):
        read_package(package)
    assert problems(package)


def test_a_linked_manifest_is_not_read(package, tmp_path):
    shutil.move(package / "edgepack.json", tmp_path / "m")
    (package / "edgepack.json").symlink_to(tmp_path / "m")
    with pytest.raises(InputRefused, match="symbolic link"):
        read_package(package)
    shutil.move(package / "evidence", tmp_path / "e")
    (package / "evidence").symlink_to(tmp_path / "e")
    (package / "edgepack.json").unlink()
    shutil.copy(tmp_path / "m", package / "edgepack.json")
    with pytest.raises(InputRefused, match="symbolic link"):
        read_package(package)


def test_a_profile_that_is_not_one_is_refused_input(package):
    from edgepack.package import packaged_target

    with pytest.raises(InputRefused, match=r"edgepack\.json: target"):
        packaged_target({"target": "x = 1", "overrides": []})
    with pytest.raises(InputRefused):
        packaged_target({"target": read_package(package).manifest["target"], "overrides": ["budget.x=1"]})


# For ever


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.name)
def test_a_package_of_every_release_verifies_and_reads(golden):
    assert problems(golden) == []
    package = read_package(golden)
    assert package.verdict == "pass"
    assert {row.name for row in package.measurements} >= {"artifact_bytes", "mean_kld"}
    assert package.artifact.is_file()


def test_there_is_a_golden_package():
    assert [path.name for path in GOLDEN] == ["0.1"]


def test_the_golden_digests_are_the_ones_it_was_released_with():
    package = read_package(GOLDEN[0])
    assert package.artifact_digest == "sha256:36b932be14d6640de714dc8b36e32c682637ef3f15ab07ab4c1bfe3a1a18f862"
    assert package.package_digest == "sha256:b18c52d1f9b5b9328a502c65d6676cf2392c30a5fe7383ff8131b9dd8a052927"


def test_verifying_needs_the_standard_library_alone(package):
    code = (
        "import sys; before = set(sys.modules); from edgepack.package import verify; import pathlib;"
        f"assert verify({str(package)!r}).whole;"
        "print(sorted({m.partition('.')[0] for m in set(sys.modules) - before}"
        " - set(sys.stdlib_module_names) - {'edgepack'}))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
