"""Target profiles: the built-in ones, the strict loader, overrides, copies."""

import dataclasses
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import get_type_hints

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgepack.errors import ProfileError, UsageError
from edgepack.target_checks import NEEDS_SOURCE
from edgepack.target_keys import LIMITS, PRESETS, TABLES, TYPES, Budget
from edgepack.targets import copy_target, list_targets, load_target, parse_target, with_overrides
from edgepack.toml_schema import MAX_BYTES, keys_of

ROOT = Path(__file__).parent.parent
NAMES = [target.name for target in list_targets()]
MINIMAL = """
name = "board"
description = "A board"
date = "2026-11-20"
[device]
arch = "arm64"
cores = 4
ram_mb = 8590
app_ram_mb = 6000
memory_bandwidth_gbs = 17.1
bandwidth_efficiency = 0.55
accelerator = "none"
[sources]
"device.cores" = "data sheet, 2026"
"device.ram_mb" = "data sheet, 2026"
"device.app_ram_mb" = "measured, 2026-11-20"
"device.memory_bandwidth_gbs" = "data sheet, 2026"
"device.bandwidth_efficiency" = "measured, 2026-11-20"
"""


def refusal(text: str | bytes, tmp_path: Path) -> str:
    """The message with which a profile of this content is refused: one ProfileError, exit code 2."""
    path = tmp_path / "board.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ProfileError) as caught:
        load_target(str(path))
    assert caught.value.exit_code == 2
    assert "board.toml" in caught.value.message
    return caught.value.message


def budget(line: str) -> str:
    return MINIMAL.replace("[sources]", f"[budget]\n{line}\n[sources]")


# The built-in profiles


def test_the_three_names_everyone_tries_come_first_and_ten_devices_follow():
    assert NAMES[:3] == ["laptop", "jetson", "phone"]
    assert len(NAMES) >= 3 + 10


@pytest.mark.parametrize("name", NAMES)
def test_a_built_in_profile_is_called_as_its_file(name):
    target = load_target(name)
    assert target.name == name
    assert target.text == (ROOT / "targets" / f"{name}.toml").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_every_physical_number_says_where_it_is_from_and_when(name):
    target = load_target(name)
    for key in NEEDS_SOURCE:
        table, field = key.split(".")
        if getattr(getattr(target, table), field) is not None:
            assert re.search(r"20\d\d", target.sources[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_budgets_are_possible_on_the_device_itself(name):
    target = load_target(name)
    assert target.budget.ram_mb <= target.device.app_ram_mb
    assert target.budget.disk_mb <= target.budget.ram_mb, "a model larger than the memory can't run"
    # A 1B model at 4.5 bits per weight reads 0.6 GB a token: it must be within the speed budget of every profile.
    reach = target.device.memory_bandwidth_gbs * target.device.bandwidth_efficiency / 0.6
    assert target.budget.decode_tokens_per_s_p10 < reach
    assert target.runtime.threads <= target.device.cores


@pytest.mark.parametrize("name", NAMES)
def test_candidates_need_no_importance_matrix(name):
    from edgepack.gguf.recipes import PRESETS as RECIPES

    assert all(not RECIPES[preset].needs_imatrix for preset in load_target(name).quantize.candidates)


def test_only_the_laptop_is_the_machine_that_builds():
    assert [target.name for target in list_targets() if target.device.is_this_machine] == ["laptop"]


def test_the_jetson_is_the_orin_nano():
    assert load_target("jetson").device == load_target("jetson-orin-nano-8gb").device


def test_presets_and_types_are_those_of_the_quantizer():
    from edgepack.gguf.recipes import PRESETS as RECIPES
    from edgepack.gguf.types import TYPES as GGML

    assert set(PRESETS) == set(RECIPES)
    assert set(TYPES) <= set(GGML)


def test_no_two_profiles_answer_to_one_name():
    every = [*NAMES, *(alias for target in list_targets() for alias in target.aliases)]
    assert len(every) == len(set(every))


def test_an_alias_finds_its_profile():
    assert load_target("orin-nano").name == "jetson-orin-nano-8gb"


def test_an_unknown_name_suggests_the_nearest_and_lists_all():
    with pytest.raises(ProfileError, match="did you mean 'jetson'") as caught:
        load_target("jetsn")
    assert all(name in caught.value.hint for name in NAMES)


@pytest.mark.parametrize(
    "name", ["../targets/laptop", "/etc/passwd", "", "a" * 10_000, "lap\0top", "laptop\n", "laptop.TOML"]
)
def test_a_name_is_never_a_path(name):
    with pytest.raises(ProfileError) as caught:
        load_target(name)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 200


def test_reading_profiles_imports_nothing_heavy():
    code = (
        "import sys; from edgepack.targets import list_targets; list_targets();"
        "print([m for m in ('numpy', 'torch', 'huggingface_hub', 'click', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_the_reference_page_names_every_key_with_its_unit():
    page = (ROOT / "docs" / "targets.md").read_text()
    for table, cls in TABLES.items():
        for name, key in keys_of(cls).items():
            row = re.search(rf"^\| `{table}\.{name}` \|.*$", page, re.MULTILINE)
            assert row, f"docs/targets.md has no row for {table}.{name}"
            assert not key.unit or key.unit in row.group(0)
    for name in NAMES:
        assert f"`{name}`" in page


# Limits


def test_limits_are_by_measurement_and_in_its_unit():
    target = with_overrides(load_target("laptop"), ["budget.disk_mb=1.5", "budget.top1_agreement=0.9"])
    limits = target.limits()
    assert limits["artifact_bytes"] == {"max": 1_500_000}
    assert limits["peak_rss_mb"] == {"max": 10_000}
    assert limits["top1_agreement"] == {"min": 0.9}
    assert limits["mean_kld"] == {"max": 0.05}
    assert "require_on_device" not in limits


def test_a_budget_is_a_floor_exactly_where_more_is_better():
    better = {"agreement", "tokens_per_s", "cosine"}
    for name in keys_of(Budget):
        if name != "require_on_device":
            floor = LIMITS[name].side == "min" if name in LIMITS else False
            assert floor == any(word in name for word in better), name


def test_a_missing_budget_is_not_gated(tmp_path):
    path = tmp_path / "board.toml"
    path.write_text(MINIMAL)
    assert load_target(str(path)).limits() == {}


# The strict loader


def test_a_short_profile_has_the_documented_defaults(tmp_path):
    path = tmp_path / "board.toml"
    path.write_text(MINIMAL)
    target = load_target(str(path))
    assert (target.format.decoder, target.runtime.engine, target.quantize.default) == ("gguf", "llama.cpp", "auto")
    assert target.measure.fidelity and target.measure.latency
    assert target.text == MINIMAL
    assert not target.device.is_this_machine


def test_an_unknown_key_suggests_the_nearest(tmp_path):
    assert "[budget] mean_kdl: unknown key; did you mean 'mean_kld'?" in refusal(budget("mean_kdl = 0.1"), tmp_path)


def test_a_key_with_another_unit_in_its_name_suggests_ours(tmp_path):
    assert "did you mean 'ram_mb'" in refusal(budget("ram_gb = 8"), tmp_path)


def test_a_key_in_the_wrong_table_is_sent_home(tmp_path):
    assert "[measure] mean_kld: unknown key; it belongs in [budget]" in refusal(
        MINIMAL + "[measure]\nmean_kld = 0.1\n", tmp_path
    )


def test_an_unknown_table_suggests_the_nearest(tmp_path):
    assert "budgets: unknown key or table; did you mean 'budget'?" in refusal(MINIMAL + "[budgets]\nx = 1\n", tmp_path)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("disk_mb = -1", "[budget] disk_mb = -1: expected a number in MB, at least 0"),
        ("disk_mb = '2 GB'", "[budget] disk_mb = '2 GB': expected a number in MB"),
        ("disk_mb = true", "[budget] disk_mb = true: expected a number in MB"),
        ("disk_mb = 2026-11-20", "[budget] disk_mb = 2026-11-20 (a date or time): expected a number"),
        ("disk_mb = 07:32:00", "(a date or time): expected a number"),
        ("disk_mb = [1]", "[budget] disk_mb = [1]: expected a number"),
        ("disk_mb = {a = 1}", "[budget] disk_mb = a table: expected a number"),
        ("disk_mb = nan", "disk_mb = nan: expected a number"),
        ("disk_mb = inf", "disk_mb = inf: expected a number"),
        ("disk_mb = 1e999", "disk_mb = inf: expected a number"),
        ("disk_mb = -0.5", "disk_mb = -0.5: expected a number"),
        ("top1_agreement = 95", "top1_agreement = 95: expected a number between 0 and 1"),
        ("require_on_device = 1", "require_on_device = 1: expected true or false"),
        ("require_on_device = 'yes'", "expected true or false"),
        ("disk_mb = " + "9" * 5000, "not valid TOML"),
        ("disk_mb = no", "not valid TOML"),
        ("disk_mb = 010", "not valid TOML"),
        ("disk_mb = 1\ndisk_mb = 2", "'disk_mb = 2': a key or table given twice"),
        ("a." * 5000 + "b = 1", "budget"),
        ("x = " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("'\\u202e' = 1", "board.toml"),
    ],
)
def test_a_bad_budget_is_named_with_what_was_expected(line, expected, tmp_path):
    message = refusal(budget(line), tmp_path)
    assert expected in message
    assert len(message) < 500


def test_hexadecimal_numbers_without_end_are_named(tmp_path):
    message = refusal(MINIMAL.replace("cores = 4", "cores = 0x" + "f" * 50_000), tmp_path)
    assert (
        "[device] cores = a number of more than 38 digits: expected a whole number in cores between 1 and 1,024"
        in message
    )


def test_a_whole_number_is_not_a_float(tmp_path):
    assert "cores = 4.0: expected a whole number in cores" in refusal(
        MINIMAL.replace("cores = 4", "cores = 4.0"), tmp_path
    )


def test_megabytes_given_as_gigabytes_are_noticed(tmp_path):
    assert "ram_mb = 8: expected a whole number in MB between 64 and" in refusal(
        MINIMAL.replace("ram_mb = 8590", "ram_mb = 8").replace("app_ram_mb = 6000", "app_ram_mb = 16"), tmp_path
    )


def test_a_word_that_is_not_a_choice_shows_the_choices(tmp_path):
    message = refusal(MINIMAL.replace('"none"', '"cude"'), tmp_path)
    assert "expected one of 'none', 'cuda', 'metal', 'vulkan', 'npu'; did you mean 'cuda'?" in message


def test_all_problems_are_told_at_once(tmp_path):
    text = budget("disk_mb = -1\nmean_kdl = 1").replace('arch = "arm64"', 'arch = "riscv"').replace("cores = 4\n", "")
    message = refusal(text, tmp_path)
    lines = message.split("\n")
    assert "5 problems" in lines[0]
    words = ("disk_mb = -1", "mean_kdl", "arch = 'riscv'", "cores is missing", "[sources] 'device.cores'")
    assert all(any(word in line for line in lines[1:]) for word in words)
    assert "Traceback" not in message


def test_a_missing_source_is_named_with_what_to_add(tmp_path):
    text = MINIMAL.replace('"device.ram_mb" = "data sheet, 2026"\n', "")
    assert 'ram_mb = 8590 has no source: add "device.ram_mb" =' in refusal(text, tmp_path)


@pytest.mark.parametrize("source", ["''", "'  '", "3", "['a']"])
def test_an_empty_source_is_none(source, tmp_path):
    text = MINIMAL.replace('"device.ram_mb" = "data sheet, 2026"', f'"device.ram_mb" = {source}')
    assert "[sources] 'device.ram_mb'" in refusal(text, tmp_path)


def test_a_source_for_a_key_that_is_not_set_suggests_the_nearest(tmp_path):
    message = refusal(MINIMAL + '"device.ram" = "x, 2026"\n', tmp_path)
    assert "the profile sets no such key; did you mean 'device.ram_mb'?" in message


def test_an_unquoted_source_key_says_to_quote_it(tmp_path):
    assert "put the key in quotes" in refusal(MINIMAL + 'runtime.threads = "x"\n', tmp_path)


def test_an_app_cannot_have_more_memory_than_the_device(tmp_path):
    assert "app_ram_mb = 9000 is more than ram_mb = 8590" in refusal(MINIMAL.replace("6000", "9000"), tmp_path)


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/x", "a b", "A", "", ".x", "-x", "a" * 65, "a/b", "x\\u0000", "x\\u202e"]
)
def test_a_profile_cannot_be_called_like_a_path(name, tmp_path):
    assert "name = " in refusal(MINIMAL.replace('"board"', f'"{name}"'), tmp_path)


@pytest.mark.parametrize("date", ["20.11.2026", "2026-13-01", "2026-1-1", "20261120", "today"])
def test_a_date_is_year_month_day(date, tmp_path):
    assert 'expected "YYYY-MM-DD"' in refusal(MINIMAL.replace("2026-11-20", date, 1), tmp_path)


def test_a_toml_date_is_not_a_text(tmp_path):
    assert "date = 2026-11-20 (a date or time): expected text" in refusal(
        MINIMAL.replace('"2026-11-20"', "2026-11-20", 1), tmp_path
    )


def test_unknown_presets_and_types_suggest_the_nearest(tmp_path):
    text = (
        MINIMAL + "[quantize]\ndefault = 'Q4_KM'\ncandidates = ['Q8', 'Q8_0']\n[quantize.tensors]\n'blk.*' = 'Q4_K_M'\n"
    )
    message = refusal(text, tmp_path)
    assert "default = 'Q4_KM': expected 'auto', a preset or a size such as 4.5bpw; did you mean 'Q4_K_M'?" in message
    assert "did you mean 'Q8_0'?" in message
    assert "[quantize.tensors] 'blk.*' = 'Q4_K_M': expected a tensor type; did you mean 'Q4_K'?" in message


@pytest.mark.parametrize(
    ("quantize", "expected"),
    [
        ("candidates = []", "at least one"),
        ("candidates = ['Q8_0', 'Q8_0']", "'Q8_0' twice"),
        ("tensors = 3", "expected a table [quantize.tensors]"),
        ("tensors.blk.x = 'Q8_0'", "put a pattern with dots in quotes"),
        ("tensors.'' = 'Q8_0'", "1 to 256"),
    ],
)
def test_a_bad_quantize_table_is_named(quantize, expected, tmp_path):
    assert expected in refusal(MINIMAL + f"[quantize]\n{quantize}\n", tmp_path)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\xef\xbb\xbf" + MINIMAL.encode(), "byte order mark"),
        (MINIMAL.encode("utf-16"), "UTF-16"),
        (MINIMAL.encode("utf-16-le"), "NUL"),
        (MINIMAL.encode() + b"\0", "NUL"),
        (MINIMAL.encode() + b"# \xff\xff", "not UTF-8 at byte"),
        (b"#" * (10 << 20), "at most 262,144"),
        (b"", "name is missing"),
        (MINIMAL.replace("A board", "A \\u0000 board").encode(), "description = 'A \\x00 board': expected text"),
        (MINIMAL.replace("A board", "A \\u202e board").encode(), "description = 'A \\u202e board': expected text"),
        (b"device = 3\nsources = 4\n", "device = 3: expected a table"),
    ],
)
def test_a_file_that_is_no_profile_is_refused_by_its_reason(data, expected, tmp_path):
    assert expected in refusal(data, tmp_path)


def test_windows_line_ends_are_fine(tmp_path):
    path = tmp_path / "board.toml"
    path.write_bytes(MINIMAL.replace("\n", "\r\n").encode())
    assert load_target(str(path)).name == "board"


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "device"])
def test_a_path_that_is_no_file_is_refused(kind, tmp_path):
    path = tmp_path / "board.toml"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    with pytest.raises(ProfileError):
        load_target(str(path))


def test_a_hostile_file_is_refused_at_once(tmp_path):
    line = "".join(f"k{i} = 1\n" for i in range(20_000))[: MAX_BYTES - 4000]
    start = time.perf_counter()
    message = refusal(budget(line[: line.rindex("\n")]), tmp_path)
    assert time.perf_counter() - start < 2
    assert "and " in message.split("\n")[-1]
    assert len(message) < 4000


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


def checked_with(table, name, value):
    """The minimal profile with one more value: its tables, and what is wrong with them."""
    from edgepack.target_checks import check
    from edgepack.toml_schema import Problems

    document = tomllib.loads(MINIMAL)
    document.setdefault(table, {})[name] = value
    document["sources"].setdefault(f"{table}.{name}", "test, 2026")
    problems = Problems("x")
    return check(document, problems), problems


@settings(max_examples=150, deadline=None)
@given(key=st.sampled_from(sorted(f"{t}.{k}" for t, c in TABLES.items() for k in keys_of(c))), value=VALUES)
@example(key="measure.windows", value=True)
@example(key="quantize.feedback", value=False)
@example(key="device.cores", value=10**400)
def test_whatever_a_key_holds_it_is_taken_or_named(key, value):
    """Any TOML value in any key: the value arrives unchanged, or a ProfileError names the key."""
    table, name = key.split(".")
    checked, problems = checked_with(table, name, value)
    if problems.found:
        assert any(name in problem for problem in problems.found)
    else:
        assert checked[table][name] == (tuple(value) if isinstance(value, list) else value)
        assert type(value) is not bool or get_type_hints(TABLES[table])[name] is bool


@pytest.mark.parametrize("key", sorted(f"{t}.{k}" for t, c in TABLES.items() for k in keys_of(c)))
@pytest.mark.parametrize("value", [True, False, 0, 1])
def test_switches_take_true_and_false_and_nothing_else_does(key, value):
    table, name = key.split(".")
    _, problems = checked_with(table, name, value)
    switch = get_type_hints(TABLES[table])[name] is bool
    if switch or type(value) is bool:
        assert any(name in problem for problem in problems.found) == (switch != (type(value) is bool))


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=200), at=st.integers(0, len(MINIMAL)))
def test_bytes_put_into_a_profile_end_in_a_target_or_a_profile_error(data, at):
    from edgepack.toml_schema import decode

    raw = MINIMAL.encode()
    try:
        target = parse_target(decode(raw[:at] + data + raw[at:], "x"), "x")
    except ProfileError:
        return
    assert target.device.cores >= 1


# Overrides


def override(*pairs: str):
    return with_overrides(load_target("laptop"), pairs)


def test_an_override_sets_a_key_and_leaves_the_text():
    target = override(
        "budget.disk_mb=500", "measure.latency=false", "runtime.context=2048", "measure.pause_seconds=0.5"
    )
    assert target.budget.disk_mb == 500
    assert target.measure.latency is False
    assert target.runtime.context == 2048
    assert target.measure.pause_seconds == 0.5
    assert target.text == load_target("laptop").text
    assert target.overrides[0] == "budget.disk_mb=500"


def test_later_overrides_win_and_earlier_ones_stay():
    target = with_overrides(override("budget.disk_mb=500", "runtime.threads=2"), ["budget.disk_mb=600"])
    assert (target.budget.disk_mb, target.runtime.threads) == (600, 2)


def test_none_takes_a_budget_away():
    assert "mean_kld" not in override("budget.mean_kld=none").limits()


def test_none_is_no_value_for_a_key_that_must_be_there():
    with pytest.raises(ProfileError, match=r"\[device\] cores = 'none': expected a whole number"):
        override("device.cores=none")


def test_a_tensor_pattern_may_hold_dots_globs_and_equals_signs():
    target = override("quantize.tensors.blk.*.ffn_down.weight=q6_k", r"quantize.tensors.^blk\.(?=1).*=Q8_0")
    assert target.quantize.tensors == {"blk.*.ffn_down.weight": "Q6_K", r"^blk\.(?=1).*": "Q8_0"}


def test_candidates_are_given_with_commas():
    assert override("quantize.candidates=Q8_0, Q4_0").quantize.candidates == ("Q8_0", "Q4_0")


def test_a_physical_number_that_is_overridden_has_the_user_as_its_source():
    target = override("device.ram_mb=34360")
    assert target.sources["device.ram_mb"] == "set by the user: device.ram_mb=34360"
    assert override("delivery.shard_mb=900").delivery.shard_mb == 900


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        ("budget.mean_kdl=1", "did you mean 'mean_kld'?"),
        ("budgt.mean_kld=1", "no table budgt; did you mean 'budget'?"),
        ("mean_kld=1", "expected table.key=value; did you mean budget.mean_kld?"),
        ("budget.mean_kld", "expected table.key=value"),
        ("", "expected table.key=value"),
        ("=", "expected table.key=value"),
        ("name=x", "expected table.key=value"),
        ("sources.device.ram_mb=x", "no table sources"),
        ("runtime.threads=2.5", "[runtime] threads = '2.5': expected a whole number"),
        ("runtime.threads=1_000", "[runtime] threads = '1_000': expected a whole number"),
        ("budget.disk_mb=500MB", "[budget] disk_mb = '500MB': expected a number in MB"),
        ("budget.disk_mb=nan", "disk_mb = 'nan': expected a number"),
        ("budget.disk_mb=inf", "disk_mb = 'inf': expected a number"),
        ("budget.disk_mb=1e999", "disk_mb = inf: expected a number"),
        ("budget.disk_mb=-1", "disk_mb = -1: expected a number"),
        ("budget.disk_mb=" + "9" * 5000, "expected a number"),
        ("budget.disk_mb=١٢", "expected a number"),
        ("measure.latency=False", "latency = 'False': expected true or false"),
        ("quantize.tensors.=Q8_0", "quantize.tensors.<pattern>=TYPE"),
        ("quantize.tensors.x", "quantize.tensors.<pattern>=TYPE"),
        ("quantize.tensors.x=", "expected a tensor type"),
        ("quantize.tensors.x=Q4_KM", "did you mean 'Q4_K'?"),
        ("quantize.tensors=Q8_0", "tensors"),
        ("quantize.default=q4_k_m", "did you mean 'Q4_K_M'?"),
        ("budget.disk_mb=1\n2", "expected a number"),
    ],
)
def test_a_bad_override_is_named_like_a_bad_key(pair, expected):
    with pytest.raises(ProfileError) as caught:
        override(pair)
    assert expected in caught.value.message
    assert caught.value.message.startswith("--set: ")
    assert "\n" not in caught.value.message
    assert "--set" in caught.value.hint


def test_all_bad_overrides_are_told_at_once():
    with pytest.raises(ProfileError) as caught:
        override("budget.x=1", "runtime.y=2", "z")
    assert "3 problems" in caught.value.message


def test_an_imatrix_in_a_profile_starts_at_the_profile_and_one_on_the_command_line_does_not(tmp_path):
    path = tmp_path / "board.toml"
    path.write_text(MINIMAL + '[quantize]\nimatrix = "m.gguf"\n')
    target = load_target(str(path))
    assert target.quantize.imatrix == str(tmp_path / "m.gguf")
    assert with_overrides(target, ["runtime.threads=1"]).quantize.imatrix == str(tmp_path / "m.gguf")
    assert with_overrides(target, ["quantize.imatrix=n.gguf"]).quantize.imatrix == "n.gguf"


def test_the_effective_values_are_json_without_a_path():
    import json

    document = json.loads(json.dumps(override("budget.disk_mb=5").as_json()))
    assert document["budget"]["disk_mb"] == 5
    assert set(TABLES) < set(document)


def test_a_target_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_target("laptop").name = "x"


# Copies


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_of_any_profile_is_valid_and_called_after_its_file(name, tmp_path):
    path = copy_target(name, tmp_path / "my-board.toml")
    copy, original = load_target(str(path)), load_target(name)
    assert copy.name == "my-board"
    assert copy.aliases == ()
    assert (copy.device, copy.budget, copy.sources) == (original.device, original.budget, original.sources)


def test_a_copy_into_a_folder_keeps_the_name(tmp_path):
    assert copy_target("jetson", tmp_path) == tmp_path / "jetson.toml"
    assert (tmp_path / "jetson.toml").read_text() == load_target("jetson").text.replace("aliases = []\n", "")


def test_a_copy_never_overwrites(tmp_path):
    (tmp_path / "x.toml").write_text("mine")
    with pytest.raises(UsageError, match=r"x\.toml exists"):
        copy_target("laptop", tmp_path / "x.toml")
    assert (tmp_path / "x.toml").read_text() == "mine"


def test_a_copy_through_a_link_to_nowhere_is_refused(tmp_path):
    (tmp_path / "x.toml").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError):
        copy_target("laptop", tmp_path / "x.toml")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("destination", ["x", "x.json", "no/such/folder/x.toml", "My Board.toml"])
def test_a_copy_to_a_place_that_cannot_be_leaves_nothing(destination, tmp_path):
    with pytest.raises(UsageError):
        copy_target("laptop", tmp_path / destination)
    assert list(tmp_path.iterdir()) == []
