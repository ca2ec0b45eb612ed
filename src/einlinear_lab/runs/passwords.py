"""Passwords of databases, which are to be shown and kept nowhere."""

from __future__ import annotations

import re
import shlex

_MASK = "***"
_MASKED = (
    # user:PASSWORD@host of an address. A password that should have been quoted may have "@", "/" or blanks in it: where
    # all of a text is an address, as an argument of a command may be, it is masked up to its last "@".
    re.compile(r"(\A(?:--?[\w-]+=)?[\w+.-]+:(?://)?[^:/@\s]*:).*(?=@)", re.DOTALL),
    re.compile(r"(://[^:/@\s]*:)[^\s'\"]*(?=@)"),
    # all that comes after "?": there, drivers have passwords under many names, which may be quoted as well
    re.compile(r"(\A(?:--?[\w-]+=)?[\w+.-]+://[^?]*\?).+", re.DOTALL),
    re.compile(r"(://[^?\s]*\?)[^\s'\"]+"),
    # name=value, as libpq and ODBC have them
    re.compile(
        r"(\b\w*(?:password|passwd|passphrase|pass|pwd|secret|token)\s*=\s*)(?:'[^']*'|\{[^}]*\}|[^\s;&'\"]+)",
        re.IGNORECASE,
    ),
)


def command_without_passwords(command: str) -> str:
    """A command with them masked in each of its words, whose quotes may hide blanks."""
    try:
        return shlex.join(map(without_passwords, shlex.split(command)))
    except ValueError:
        return without_passwords(command)


def without_passwords(text: str) -> str:
    """A text with what may be a password in an address of a database masked.

    >>> without_passwords("postgresql+psycopg://me:secret@host/name")
    'postgresql+psycopg://me:***@host/name'
    >>> without_passwords("mysql://host/name?user=me&password=secret")
    'mysql://host/name?***'
    """
    for pattern in _MASKED:
        text = pattern.sub(rf"\1{_MASK}", text)
    return text
