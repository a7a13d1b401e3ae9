"""Text from strangers as Markdown that shows it and does nothing else."""

from __future__ import annotations

import re
from typing import Any

from edgepack.package.licences import one_line


def escape(value: Any) -> str:
    """Text from elsewhere as Markdown that shows it and does nothing else."""
    text = one_line(value)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # An underscore inside a word is plain (CommonMark 0.31, rule 2 of emphasis): Q4_K_M stays readable.
    return re.sub(r"([\\`*\[\]|~$!]|^[#+\-=]|(?<!\w)_|_(?!\w))", r"\\\1", text)
