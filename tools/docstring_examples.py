"""Extension of griffe: examples in docstrings become code blocks in the API reference."""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
# a doctest at the margin: its prompt and everything up to the next empty line
DOCTEST = re.compile(r"^>>> (?:.+\n?)+", re.MULTILINE)


class DocstringExamples(griffe.Extension):
    """Reads the section "Example:" as griffe reads "Examples:", and fences doctests that stand outside of it."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of every object that is loaded."""
        if obj.docstring is not None:
            text = EXAMPLE.sub("Examples:", obj.docstring.value)
            obj.docstring.value = DOCTEST.sub(lambda code: f"```pycon\n{code[0].rstrip()}\n```\n", text)
