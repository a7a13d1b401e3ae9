"""Reads a small TOML file that a stranger may have written, and checks it against a table of keys.

Strict on purpose: a typo in a budget must never mean "not gated". Every problem of a file is collected and shown at
once, each with its table, key, value and what was expected. Knows nothing of targets: the keys are the caller's.

`tomllib` alone is not enough: it accepts `nan`, `inf`, `1e999`, dates and control characters, and ends some hostile
files in RecursionError or a plain ValueError instead of its own error (observed with Python 3.11).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import stat
import tomllib
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from edgepack.errors import ProfileError

MAX_BYTES = 256 * 1024
MAX_TEXT = 2000
# More problems than this are counted, not listed: the first ones are what a person can act on.
SHOWN = 20

Kind = Literal["text", "integer", "number", "switch", "names"]
Table = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Key:
    """What one key of a file may hold.

    Args:
        kind: `text`, `integer`, `number` (integer or float), `switch` (true/false), `names` (a list of texts).
        meaning: One line for people; the reference page is made of these.
        unit: Unit of a number, as in its name: `MB` (10^6 bytes), `GB/s`, `ms`.
        low: Smallest value allowed.
        high: Largest value allowed; a value beyond it is nearly always another unit.
        choices: The words allowed, for `text` and `names`; empty allows any.
        needs_source: True for a physical number, which must say where it is from.
        optional: True where the key may be taken away by an override (`none`).
    """

    kind: Kind
    meaning: str
    unit: str = ""
    low: float = 0
    high: float = math.inf
    choices: tuple[str, ...] = ()
    needs_source: bool = False
    optional: bool = False

    def expected(self) -> str:
        """What is allowed, in words."""
        if self.choices:
            few = self.choices[:8]
            words = ", ".join(repr(choice) for choice in few) + (", ..." if len(self.choices) > 8 else "")
            return f"a list of {words}" if self.kind == "names" else f"one of {words}"
        unit = f" in {self.unit}" if self.unit not in ("", "1") else ""
        bounds = f", at least {self.low:,}" if math.isinf(self.high) else f" between {self.low:,} and {self.high:,}"
        return {
            "text": "text",
            "names": "a list of texts",
            "switch": "true or false",
            "integer": f"a whole number{unit}{bounds}",
            "number": f"a number{unit}{bounds}",
        }[self.kind]

    def accepts(self, value: Any) -> bool:
        """True when `value` has exactly the type (a bool is no number) and lies within the bounds."""
        if self.kind == "switch":
            return type(value) is bool
        if self.kind == "text":
            return printable(value) and (not self.choices or value in self.choices)
        if self.kind == "names":
            words = type(value) is list and all(printable(word) for word in value)
            return words and (not self.choices or all(word in self.choices for word in value))
        if type(value) is not int and (self.kind == "integer" or type(value) is not float):
            return False
        return bool(self.low <= value <= self.high) and (type(value) is int or math.isfinite(value))


def key(kind: Kind, meaning: str, *, default: Any = dataclasses.MISSING, **rules: Any) -> Any:
    """A dataclass field that is a key of the file; without a `default` the key is required."""
    metadata = {"key": Key(kind, meaning, **rules)}
    return dataclasses.field(default=default, metadata=metadata)


def keys_of(table: type) -> dict[str, Key]:
    """The keys a dataclass declares through `key`, in order."""
    return {f.name: f.metadata["key"] for f in dataclasses.fields(table) if "key" in f.metadata}


def required_keys(table: type) -> list[str]:
    """The keys of a dataclass that have no default."""
    return [f.name for f in dataclasses.fields(table) if "key" in f.metadata and f.default is dataclasses.MISSING]


class Problems:
    """What is wrong with one file, collected so that a person sees all of it at once."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.found: list[str] = []

    def add(self, problem: str) -> None:
        """Note a problem."""
        self.found.append(problem)

    def raise_if_any(self, hint: str | None = None) -> None:
        """Raise every problem in one error, one line each.

        Raises:
            ProfileError: There is at least one.
        """
        if not self.found:
            return
        if len(self.found) == 1:
            raise ProfileError(f"{self.where}: {self.found[0]}", hint=hint)
        lines = self.found[:SHOWN]
        if len(self.found) > SHOWN:
            lines = [*lines, f"and {len(self.found) - SHOWN} more"]
        raise ProfileError("\n".join([f"{self.where}: {len(self.found)} problems", *lines]), hint=hint)

    def unknown(self, name: str, table: str, tables: Mapping[str, Iterable[str]]) -> None:
        """Note a key that `table` does not have, with the nearest one it has, or the table it belongs to.

        Args:
            name: The unknown key.
            table: The table it stands in; empty for the top of the file.
            tables: Every table with its keys; the key `""` holds the keys and tables at the top.
        """
        if len(self.found) >= SHOWN:  # the suggestion would not be shown, and costs time on a hostile file
            self.found.append("")
            return
        advice = ""
        near = nearest(name, tables[table])
        homes = [other for other, names in tables.items() if name in set(names) and other != table]
        if homes:
            home = f"[{homes[0]}]" if homes[0] else "the top of the file"
            advice = f"; it belongs in {home}"
        elif near:
            advice = f"; did you mean {near!r}?"
        place = f"[{table}] {show_name(name)}" if table else show_name(name)
        self.found.append(f"{place}: unknown {'key' if table else 'key or table'}{advice}")


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The word of `words` most like `word`, or None when none is close."""
    lowered = {other.lower(): other for other in words}
    found = difflib.get_close_matches(word[:64].lower(), list(lowered), n=1, cutoff=0.6)
    return lowered[found[0]] if found else None


def printable(value: Any) -> bool:
    """True for text without control or invisible formatting characters (bidirectional marks among them)."""
    return (
        type(value) is str
        and len(value) <= MAX_TEXT
        and not any(unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in value)
    )


def show(value: Any) -> str:
    """A value for a message: short, on one line, never a traceback of its own."""
    if isinstance(value, Mapping):
        return "a table"
    if type(value) is list:
        return "a list" if len(value) > 8 or any(isinstance(x, (dict, list)) for x in value) else _list(value)
    if type(value) is int and value.bit_length() > 128:
        return "a number of more than 38 digits"
    if type(value) is bool:
        return "true" if value else "false"
    if type(value) in (int, float, str):
        text = ascii(value)
        return text if len(text) <= 60 else text[:56] + "...'"
    return f"{value} (a date or time)"


def show_name(name: str) -> str:
    """A key for a message: as it stands when plain, escaped and cut when not."""
    return name if re.fullmatch(r"[A-Za-z0-9_.\-]{1,64}", name) else show(name)


def _list(values: list[Any]) -> str:
    return "[" + ", ".join(show(value) for value in values) + "]"


def read_text(path: Path) -> str:
    """The text of a profile.

    Raises:
        ProfileError: Not there, not a regular file, larger than 256 KiB, not UTF-8 (without a byte order mark).
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ProfileError(f"{path}: not a regular file")
        if status.st_size > MAX_BYTES:
            raise ProfileError(f"{path}: {status.st_size:,} bytes; a profile has at most {MAX_BYTES:,}")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ProfileError(
            f"{path}: no such file", hint="`edgepack targets list` shows the built-in profiles."
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ProfileError(f"{show_name(str(path))}: can't be read: {getattr(error, 'strerror', error)}") from None
    return decode(data, str(path))


def decode(data: bytes, where: str) -> str:
    """Bytes to text, refusing every encoding but plain UTF-8.

    Raises:
        ProfileError: A byte order mark, UTF-16, a NUL, or bytes that are not UTF-8.
    """
    if len(data) > MAX_BYTES:
        raise ProfileError(f"{where}: more than {MAX_BYTES:,} bytes, the most a profile may have")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ProfileError(f"{where}: is UTF-16; expected UTF-8", hint="Save the file as UTF-8.")
    if data.startswith(b"\xef\xbb\xbf"):
        raise ProfileError(
            f"{where}: starts with a byte order mark; expected plain UTF-8", hint="Save it as UTF-8 without BOM."
        )
    if b"\0" in data:
        raise ProfileError(f"{where}: holds a NUL byte at offset {data.index(0)}; expected text")
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ProfileError(f"{where}: not UTF-8 at byte {error.start}") from None


def parse(text: str, where: str) -> Table:
    """TOML text to a table.

    Raises:
        ProfileError: Not TOML (a duplicate key too), or nested too deeply to be a profile.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ProfileError(f"{where}: nested too deeply to be a profile") from None
    except ValueError as error:  # TOMLDecodeError is one; a number of 5,000 digits raises a plain one
        raise ProfileError(f"{where}: {_syntax(error, text)}") from None


def _syntax(error: ValueError, text: str) -> str:
    """The message of tomllib with the line it means, and a duplicate key called by its name."""
    found = re.search(r"\(at line (\d+), column \d+\)", str(error))
    if not found:
        return f"not valid TOML: {str(error).splitlines()[0]}"
    number = int(found.group(1))
    lines = text.split("\n")
    line = lines[number - 1].strip() if number <= len(lines) else ""
    reason = str(error).replace(found.group(0), "").strip()
    if reason in ("Cannot overwrite a value", "Cannot mutate immutable namespace") or "declare" in reason.lower():
        reason = "a key or table given twice"
    return f"not valid TOML: line {number}, {show(line)}: {reason}"
