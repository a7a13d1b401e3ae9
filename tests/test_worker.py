"""The worker against children that behave, die, hang, print, lie and are killed; nothing is left of any of them."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import edgepack
from edgepack import errors
from edgepack.worker import (
    Limits,
    child_environment,
    last_words,
    run,
    run_measured,
    side_by_side,
    terminate_as_exit,
)

HERE = Path(__file__).parent
ROOT = HERE.parent


@pytest.fixture(autouse=True)
def functions_are_importable(monkeypatch):
    monkeypatch.syspath_prepend(HERE)


def call(function, /, progress=lambda done, total: None, limits=Limits(), **arguments):
    return run(f"worker_functions:{function}", arguments, what="the test", progress=progress, limits=limits)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def open_descriptors():
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


def gone(pids, seconds=3.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(map(is_alive, pids)):
            return True
        time.sleep(0.01)
    return False


def test_the_result_comes_back_through_json():
    value = {"a": [1, 2.5, None, True], "b": {"ü": "\n\0\U0001f600"}, "big": "x" * 300_000, "inf": math.inf}
    assert call("echo", **value) == value


def test_starting_costs_little():
    best = min(run_measured("worker_functions:echo", {}, what="x")[1].wall_seconds for _ in range(3))
    assert best < 1.0  # 0.03 s on an idle machine; the bound only catches a heavy import


def test_the_child_loads_nothing_heavy():
    code = "import sys, edgepack.worker_child; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert not {"numpy", "torch", "asyncio", "click", "rich", "llama_cpp"} & set(done.stdout.split())


def test_progress_is_throttled_and_ends_with_the_last_step():
    seen = []
    started = time.monotonic()
    assert call("counts", progress=lambda done, total: seen.append((done, total)), total=5000, seconds=0.5) == 5000
    assert seen[-1] == (5000, 5000)
    assert 2 <= len(seen) <= 20 * (time.monotonic() - started) + 2  # 20 a second, the first and the last
    assert seen == sorted(seen)


def test_progress_may_come_from_several_threads():
    seen = []
    assert call("counts_in_threads", progress=lambda done, total: seen.append(done), total=20_000) == "done"
    assert seen


def test_an_error_in_the_progress_callback_ends_the_child(tmp_path):
    class Mine(Exception):
        pass

    def fail(done, total):
        raise Mine

    with pytest.raises(Mine):
        call("counts", progress=fail, total=1000, seconds=30)


def test_tokens_and_sockets_do_not_reach_the_child(monkeypatch):
    kept = {"OMP_NUM_THREADS": "3", "HF_HOME": "/x", "EDGEPACK_CACHE": "/y", "LC_ALL": "C.UTF-8"}
    dropped = ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "SSH_AUTH_SOCK", "EDGEPACK_API_KEY", "GITHUB_TOKEN", "LD_PRELOAD"]
    for name, value in kept.items():
        monkeypatch.setenv(name, value)
    for name in dropped:
        monkeypatch.setenv(name, "marker-7f3a")
    found = call("surroundings")
    assert kept.items() <= found["environment"].items()
    assert "marker-7f3a" not in str(found["environment"])
    assert found["environment"]["HF_HUB_OFFLINE"] == found["environment"]["TRANSFORMERS_OFFLINE"] == "1"


def test_the_child_is_confined():
    found = call("surroundings")
    assert found["core"] == [0, 0]
    assert found["session"]
    assert found["stdin"] == ""
    assert found["cwd"] == str(Path.cwd())
    assert found["uid"] == os.getuid()
    assert found["edgepack"] == edgepack.__file__
    assert Path(found["temporary"]).name.startswith("edgepack-")
    assert not Path(found["temporary"]).exists()


def test_a_module_in_the_working_folder_is_not_imported(tmp_path, monkeypatch):
    for name in ("json", "numpy", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the working folder')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    assert call("echo", a=1) == {"a": 1}


def test_the_environment_has_no_relative_place_to_import_from():
    paths = child_environment({"PYTHONPATH": ".", "PATH": "/bin"}, "/tmp/x")["PYTHONPATH"].split(os.pathsep)
    assert all(Path(path).is_absolute() for path in paths)
    assert str(ROOT) in paths


def test_there_is_no_network_where_namespaces_are_allowed():
    allowed = subprocess.run(["unshare", "-n" if os.getuid() == 0 else "-rn", "true"], capture_output=True).returncode
    assert allowed != 0 or call("interfaces") == ["lo"]


@pytest.mark.parametrize("kind", ["InputRefused", "ConformanceError", "MissingError", "BudgetError", "EdgepackError"])
def test_an_edgepack_error_comes_back_as_itself(kind):
    with pytest.raises(errors.EdgepackError) as caught:
        call("raises", kind=kind, message="weights.safetensors: tensor x: NaN", hint="Do this.")
    assert type(caught.value) is getattr(errors, kind)
    assert (str(caught.value), caught.value.hint) == ("weights.safetensors: tensor x: NaN", "Do this.")


def test_a_full_disk_in_the_child_is_a_storage_error():
    with pytest.raises(errors.StorageError, match=r"^/data/model.gguf: no space left on device$") as caught:
        call("fills_the_disk", path="/data/model.gguf")
    assert "Free some space" in caught.value.hint


def test_another_exception_names_its_type_text_and_place():
    with pytest.raises(errors.StepError, match=r"the test failed: IndexError: list index out of range \(worker_func"):
        call("raises_index_error")


@pytest.mark.parametrize("function", ["no_such_module:f", "worker_functions:no_such_function", "worker_functions"])
def test_a_function_that_does_not_exist_is_a_step_error(function):
    with pytest.raises(errors.StepError, match="the test failed: "):
        run(function, {}, what="the test")


def test_a_failed_assertion_of_ggml_is_quoted_in_one_clean_line():
    with pytest.raises(errors.StepError) as caught:
        call("aborts_like_ggml")
    expected = "the worker died of signal 6 (Aborted): ggml/src/ggml.c:1234: GGML_ASSERT(ne00 % 32 == 0) failed"
    assert str(caught.value) == f"the test failed: {expected}"


def test_a_crash_is_named():
    with pytest.raises(errors.StepError, match=r"died of signal 11 \(Segmentation fault\)"):
        call("segfaults")


def test_a_kill_from_outside_is_told_as_lack_of_memory_with_the_peak():
    with pytest.raises(errors.StepError) as caught:
        call("allocates_and_is_killed", megabytes=200)
    text = str(caught.value)
    assert text.startswith("the test failed: killed (signal 9), likely out of memory, peak RSS ")
    assert 200 <= int(text.split()[-2]) < 400


def test_bad_alloc_is_lack_of_memory():
    with pytest.raises(errors.StepError, match=r"out of memory \(signal 6\).*bad_alloc"):
        call("dies_of_bad_alloc")


def test_the_memory_limit_holds():
    with pytest.raises(errors.StepError, match="the test failed: out of memory") as caught:
        call("allocates", megabytes=4096, limits=Limits(memory_bytes=1 << 30))
    assert "Free memory" in caught.value.hint


def test_the_time_limit_holds_and_takes_grandchildren_along(tmp_path):
    pids = tmp_path / "pids"
    started = time.monotonic()
    with pytest.raises(errors.StepError, match=r"not done after 1 s, stopped"):
        call("sleeps", seconds=60, pids=str(pids), limits=Limits(wall_seconds=1))
    assert time.monotonic() - started < 5
    assert gone(map(int, pids.read_text().split()))


def test_the_limit_of_processor_time_holds():
    with pytest.raises(errors.StepError, match="used more than 1 s of processor time"):
        call("computes_forever", limits=Limits(cpu_seconds=1))


@pytest.mark.parametrize("status", [0, 1, 77])
def test_an_exit_without_a_result_is_an_error(status):
    with pytest.raises(errors.StepError, match=f"ended with status {status} and no result"):
        call("exits", status=status)


def test_what_native_code_prints_on_stdout_is_not_a_result():
    assert call("native_noise") == "the real one"


def test_a_flood_of_output_is_read_and_forgotten():
    with pytest.raises(errors.StepError, match=r"x\.cpp:1: the end"):
        call("prints_forever", megabytes=1000)


def test_a_result_that_is_too_large_is_refused_with_its_size():
    with pytest.raises(errors.StepError, match=r"its result takes \d+ bytes of JSON"):
        call("returns_much", megabytes=17)
    assert len(call("returns_much", megabytes=8)) == 8 << 20


def test_a_result_that_is_no_json_is_an_error():
    with pytest.raises(errors.StepError, match="TypeError: Object of type set is not JSON serializable"):
        call("returns_a_set")


@pytest.mark.parametrize(
    "data", ["{", "[1]", '{"progress": 3}', '{"progress": ["a", "b"]}', "[" * 100_000, '{"error": "text"}', "\0"]
)
def test_a_child_that_sends_rubbish_is_stopped(data):
    started = time.monotonic()
    with pytest.raises(errors.StepError, match="the test failed: "):
        call("garbles_the_pipe", data=data)
    assert time.monotonic() - started < 10


def test_usage_is_that_of_the_child_alone():
    ballast = bytearray(b"x") * (400 << 20)  # ru_maxrss of a child starts at its parent's
    _, small = run_measured("worker_functions:allocates", {"megabytes": 1}, what="x")
    del ballast
    _, large = run_measured("worker_functions:allocates", {"megabytes": 150}, what="x")
    assert small.peak_rss_bytes < 100e6
    assert 150 << 20 <= large.peak_rss_bytes < 300e6
    assert 0 < large.cpu_seconds < 10
    assert large.wall_seconds > 0


def test_what_the_function_started_ends_with_it():
    assert gone([call("leaves_a_grandchild")])


def test_no_descriptor_is_left_open():
    call("echo")
    before = open_descriptors()
    call("echo")
    with pytest.raises(errors.StepError):
        call("segfaults")
    assert open_descriptors() == before


def test_an_interpreter_that_can_not_start_is_a_step_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    before = open_descriptors()
    with pytest.raises(errors.StepError, match="could not be started"):
        call("echo")
    assert open_descriptors() == before


DRIVER = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from edgepack.worker import run
try:
    run("worker_functions:sleeps", {{"seconds": 60, "pids": sys.argv[1]}}, what="the test")
finally:
    print("cleaned up", flush=True)
"""


@pytest.fixture
def driver(tmp_path):
    """A process that waits for a worker with a grandchild; the pids of those two; its folder for temporary files."""
    temporary, pids = tmp_path / "tmp", tmp_path / "pids"
    temporary.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER.format(root=str(ROOT), tests=str(HERE)), str(pids)],
        env=os.environ | {"TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 20
    while not pids.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    yield process, [int(pid) for pid in pids.read_text().split()], temporary
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_the_whole_group_and_cleans_up(driver, number, status):
    process, pids, temporary = driver
    assert all(map(is_alive, pids))
    process.send_signal(number)
    output, _ = process.communicate(timeout=5)
    assert process.returncode == status
    assert "cleaned up" in output
    assert gone(pids)
    assert not list(temporary.iterdir())


def test_a_second_interrupt_ends_at_once(driver):
    process, pids, _ = driver
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=5)
    assert time.monotonic() - started < 1
    assert gone(pids)


def test_a_killed_parent_leaves_no_orphan(driver):
    process, pids, _ = driver
    process.kill()
    process.wait()
    assert gone(pids)


def test_a_killed_child_is_reported_and_its_grandchild_ended(driver):
    process, pids, temporary = driver
    os.kill(pids[0], signal.SIGKILL)
    _, text = process.communicate(timeout=5)
    assert "the test failed: killed (signal 9), likely out of memory" in text
    assert gone(pids)
    assert not list(temporary.iterdir())


def test_handlers_of_the_program_are_kept_and_defaults_restored():
    def mine(number, frame):
        pass

    signal.signal(signal.SIGTERM, mine)
    try:
        with terminate_as_exit():
            assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with pytest.raises(SystemExit) as caught, terminate_as_exit():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_last_words_are_the_reason_not_the_backtrace():
    assert last_words(b"") == ""
    assert last_words(b"one\n\ntwo\n  \n") == "two"
    assert last_words(b"load failed: tensor x\nsome notice\n") == "load failed: tensor x"
    assert (
        last_words(b"a/b.cpp:7: boom\nFatal Python error: Aborted\nStack (most recent call first):\n")
        == "a/b.cpp:7: boom"
    )
    assert last_words(b"\xff\xfe " * 500, limit=20) == "\ufffd\ufffd" + " \ufffd\ufffd" * 6


def test_two_workers_run_side_by_side() -> None:
    started = time.monotonic()
    found = side_by_side(lambda: call("wait", seconds=0.8), lambda: call("wait", seconds=0.9))
    assert found == (0.8, 0.9)
    assert time.monotonic() - started < 1.6


@pytest.mark.parametrize("failing", [0, 1])
def test_what_fails_first_ends_the_worker_beside_it_and_is_what_is_reported(failing: int) -> None:
    functions = [lambda: call("wait", seconds=30), lambda: call("wait", seconds=30)]
    functions[failing] = lambda: call("refuse_after", seconds=0.2)
    started = time.monotonic()
    with pytest.raises(errors.InputRefused, match="refused beside"):
        side_by_side(*functions)
    assert time.monotonic() - started < 5


def test_a_failure_reaches_workers_nested_in_the_other_side() -> None:
    def nested() -> object:
        return side_by_side(lambda: call("wait", seconds=30), lambda: call("wait", seconds=30))

    started = time.monotonic()
    with pytest.raises(errors.InputRefused, match="refused beside"):
        side_by_side(nested, lambda: call("refuse_after", seconds=0.2))
    assert time.monotonic() - started < 5


def test_a_failure_beside_leaves_the_next_workers_of_this_thread_alone() -> None:
    with pytest.raises(errors.InputRefused):
        side_by_side(lambda: call("wait", seconds=30), lambda: call("refuse_after", seconds=0.1))
    assert call("wait", seconds=0.0) == 0.0
