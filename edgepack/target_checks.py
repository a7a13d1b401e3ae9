"""Checks a parsed profile against its keys, and applies `--set` overrides to it before the check.

Both ways in end in the same rules, so a wrong unit on the command line reads like a wrong unit in the file.
"""

from __future__ import annotations

import datetime
import re
from typing import Any

from edgepack.target_keys import PRESETS, TABLES, TOP, TYPES
from edgepack.toml_schema import Key, Problems, Table, keys_of, nearest, printable, required_keys, show, show_name

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
# A size in place of a preset, as edgepack/gguf/size.py reads it; tests hold the two together.
_SIZE = re.compile(r"[0-9]{1,18}(\.[0-9]{1,18})?[ \t]*(bpw|[KMG]?B|[KMG]iB)", re.IGNORECASE | re.ASCII)
_PATTERN_MOST = 256  # characters of a tensor name pattern; names have at most 64 (GGML_MAX_NAME, ggml.h)
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")
_KEYS = {table: keys_of(cls) for table, cls in TABLES.items()}
# The keys of every table; "" is the top of the file.
_WORDS: dict[str, list[str]] = {
    "": [*TOP, *TABLES, "sources"],
    **{table: [*keys, *(["tensors"] if table == "quantize" else [])] for table, keys in _KEYS.items()},
}
NEEDS_SOURCE = [f"{table}.{name}" for table, keys in _KEYS.items() for name, key in keys.items() if key.needs_source]


def check(document: Table, problems: Problems) -> dict[str, dict[str, Any]]:
    """Check a whole profile.

    Args:
        document: The parsed TOML; `sources` is added when it is missing.
        problems: Everything wrong is added here.

    Returns:
        The arguments of each table's dataclass; complete only if no problem was found.
    """
    for name in document:
        if name not in _WORDS[""]:
            problems.unknown(name, "", _WORDS)
    tables = {table: _check_table(document, table, problems) for table in TABLES}
    _check_top(document, problems)
    _check_sources(document, problems)
    _check_together(tables, problems)
    return tables


def _check_table(document: Table, table: str, problems: Problems) -> dict[str, Any]:
    values = document.get(table, {})
    if not isinstance(values, dict):
        problems.add(f"{table} = {show(values)}: expected a table, [{table}]")
        return {}
    checked: dict[str, Any] = {}
    for name, value in values.items():
        key = _KEYS[table].get(name)
        if table == "quantize" and name == "tensors":
            checked[name] = _check_tensors(value, problems)
        elif key is None:
            problems.unknown(name, table, _WORDS)
        elif not key.accepts(value):
            problems.add(f"[{table}] {name} = {show(value)}: expected {key.expected()}{_meant(key, value)}")
        else:
            checked[name] = tuple(value) if key.kind == "names" else value
    for name in required_keys(TABLES[table]):
        if name not in values:
            problems.add(f"[{table}] {name} is missing: {_KEYS[table][name].expected()}")
    return checked


def _meant(key: Key, value: Any) -> str:
    """The nearest allowed word for a word that is not allowed."""
    words = value if type(value) is list else [value]
    for word in words:
        if key.choices and type(word) is str and word not in key.choices:
            near = nearest(word, key.choices)
            return f"; did you mean {near!r}?" if near else f"; {show(word)} is none of them"
    return ""


def _check_tensors(value: Any, problems: Problems) -> dict[str, str]:
    if not isinstance(value, dict):
        problems.add(f"[quantize] tensors = {show(value)}: expected a table [quantize.tensors] of pattern = type")
        return {}
    checked = {}
    for pattern, word in value.items():
        place = f"[quantize.tensors] {show(pattern)}"
        if not pattern or len(pattern) > _PATTERN_MOST or not printable(pattern):
            problems.add(f"{place}: expected a tensor name or pattern of 1 to {_PATTERN_MOST} printable characters")
        elif type(word) is not str or word.upper() not in TYPES:
            near = nearest(word, TYPES) if type(word) is str else None
            advice = f"; did you mean {near!r}?" if near else f": {', '.join(TYPES)}"
            quoted = "; put a pattern with dots in quotes" if isinstance(word, dict) else ""
            problems.add(f"{place} = {show(word)}: expected a tensor type{quoted or advice}")
        else:
            checked[pattern] = word.upper()
    return checked


def _check_top(document: Table, problems: Problems) -> None:
    for name, key in TOP.items():
        value: Any = document.get(name)
        if name not in document:
            if name != "aliases":
                problems.add(f"{name} is missing: {key.meaning}")
        elif not key.accepts(value):
            problems.add(f"{name} = {show(value)}: expected {key.expected()} ({key.meaning})")
        elif name == "name" and not NAME.fullmatch(value):
            problems.add(f"name = {show(value)}: expected {TOP['name'].meaning}, at most 64, no path")
        elif name == "aliases" and not all(NAME.fullmatch(alias) for alias in value):
            problems.add(f"aliases = {show(value)}: expected names like those of profiles")
        elif name == "date" and not _is_date(value):
            problems.add(f'date = {show(value)}: expected "YYYY-MM-DD"')


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _check_sources(document: Table, problems: Problems) -> None:
    """Every physical number has a source; every source belongs to a key that is set."""
    sources = document.setdefault("sources", {})
    if not isinstance(sources, dict):
        problems.add(f"sources = {show(sources)}: expected a table, [sources]")
        return
    values = {f"{t}.{k}" for t in TABLES if isinstance(document.get(t), dict) for k in document[t]}
    for name, source in sources.items():
        if isinstance(source, dict):
            problems.add(
                f'[sources] {show_name(name)} is a table: put the key in quotes, "{show_name(name)}.<key>" = ...'
            )
        elif name not in values:
            near = nearest(name, values)
            advice = f"; did you mean {near!r}?" if near else ""
            problems.add(f"[sources] {show(name)}: the profile sets no such key{advice}")
        elif not printable(source) or not source.strip():
            problems.add(f"[sources] {show(name)} = {show(source)}: expected text: where the number is from, and when")
    for name in NEEDS_SOURCE:
        if name in values and name not in sources:
            table, key = name.split(".")
            problems.add(
                f"[{table}] {key} = {show(document[table][key])} has no source: "
                f'add "{name}" = "<where the number is from, date>" to [sources]'
            )


def _check_together(tables: dict[str, dict[str, Any]], problems: Problems) -> None:
    """Rules over more than one key."""
    device, quantize = tables["device"], tables["quantize"]
    if device.get("app_ram_mb", 0) > device.get("ram_mb", float("inf")):
        problems.add(f"[device] app_ram_mb = {device['app_ram_mb']} is more than ram_mb = {device['ram_mb']}")
    default = quantize.get("default", "auto")
    if default != "auto" and default not in PRESETS and not _SIZE.fullmatch(default):
        near = nearest(default, ["auto", *PRESETS])
        advice = f"; did you mean {near!r}?" if near else ""
        problems.add(
            f"[quantize] default = {show(default)}: expected 'auto', a preset or a size such as 4.5bpw{advice}"
        )
    candidates = quantize.get("candidates", ("Q8_0",))
    if not candidates:
        problems.add("[quantize] candidates = []: expected at least one preset")
    if len(set(candidates)) < len(candidates):
        twice = next(name for name in candidates if candidates.count(name) > 1)
        problems.add(f"[quantize] candidates holds {twice!r} twice")


def apply_override(document: Table, pair: str, problems: Problems) -> None:
    """Set one `table.key=value` in a parsed profile; the value is checked with the rest of the profile afterwards.

    A physical number that is overridden gets the override as its source: the source in the file is for another number.

    Args:
        document: Changed in place.
        pair: `budget.disk_mb=500`, `budget.mean_kld=none`, `quantize.tensors.<pattern>=Q6_K`.
        problems: A pair without `=`, or an unknown key, is added here.
    """
    prefix = "quantize.tensors."
    if pair.startswith(prefix):  # a pattern may hold dots and equals signs, a type holds neither
        pattern, equals, word = pair[len(prefix) :].rpartition("=")
        if not equals or not pattern:
            problems.add(f"{show(pair)}: expected quantize.tensors.<pattern>=TYPE")
            return
        tensors = _table(_table(document, "quantize"), "tensors")
        tensors.pop(pattern, None)  # the last one said wins, and stands last
        tensors[pattern] = word.strip()
        return
    name, equals, text = pair.partition("=")
    table, dot, key_name = name.strip().partition(".")
    if not equals or not dot:
        problems.add(f"{show(pair)}: expected table.key=value{_home(name.strip())}")
    elif table not in TABLES:
        near = nearest(table, TABLES)
        problems.add(f"{show(name)}: no table {show_name(table)}" + (f"; did you mean {near!r}?" if near else ""))
    elif key_name not in _KEYS[table]:
        problems.unknown(key_name, table, _WORDS)
    else:
        key = _KEYS[table][key_name]
        values = _table(document, table)
        sources = _table(document, "sources")
        sources.pop(f"{table}.{key_name}", None)
        if key.optional and text.strip() == "none":
            values.pop(key_name, None)
            return
        values[key_name] = _value(key, text.strip())
        if key.needs_source:
            sources[f"{table}.{key_name}"] = f"set by the user: {name.strip()}={text.strip()}"[:200]


def _home(name: str) -> str:
    """For a key given without its table: the table it belongs to."""
    homes = [f"{table}.{name}" for table, keys in _KEYS.items() if name in keys]
    return f"; did you mean {homes[0]}?" if homes else ""


def _table(document: Table, name: str) -> Table:
    """The table `name`, made when it is missing; a value that is no table stays, for the check to name."""
    value = document.setdefault(name, {})
    return value if isinstance(value, dict) else {}


def _value(key: Key, text: str) -> Any:
    """The text as the key's type where it reads as one; else the text itself, which the check refuses by name."""
    if key.kind == "names":
        return [word.strip() for word in text.split(",") if word.strip()]
    if key.kind == "switch" and text in ("true", "false"):
        return text == "true"
    if key.kind in ("integer", "number") and _WHOLE.fullmatch(text):
        return int(text)
    if key.kind == "number" and _DECIMAL.fullmatch(text) and len(text) < 64:
        return float(text)
    return text
