"""Masking of passwords in addresses of databases, in messages and files."""

from __future__ import annotations

import re
import shlex

_MASK = "***"
_MASKED = (
    # user:PASSWORD@host of an address. An unquoted password may contain "@", "/" or blanks: a text that is a single
    # address, such as an argument of a command, is masked up to its last "@".
    re.compile(r"(\A(?:--?[\w-]+=)?[\w+.-]+:(?://)?[^:/@\s]*:).*(?=@)", re.DOTALL),
    re.compile(r"(://[^:/@\s]*:)[^\s'\"]*(?=@)"),
    # Everything after "?", where drivers have passwords under many names, some of them quoted.
    re.compile(r"(\A(?:--?[\w-]+=)?[\w+.-]+://[^?]*\?).+", re.DOTALL),
    re.compile(r"(://[^?\s]*\?)[^\s'\"]+"),
    # name=value of libpq and ODBC.
    re.compile(
        r"(\b\w*(?:password|passwd|passphrase|pass|pwd|secret|token)\s*=\s*)(?:'[^']*'|\{[^}]*\}|[^\s;&'\"]+)",
        re.IGNORECASE,
    ),
)


def command_without_passwords(command: str) -> str:
    """Mask passwords in each word of a command; quoted words may contain blanks."""
    try:
        return shlex.join(map(without_passwords, shlex.split(command)))
    except ValueError:
        return without_passwords(command)


def without_passwords(text: str) -> str:
    """Mask possible passwords in the addresses of a text.
    >>> without_passwords("postgresql+psycopg://me:secret@host/name")
    'postgresql+psycopg://me:***@host/name'
    >>> without_passwords("mysql://host/name?user=me&password=secret")
    'mysql://host/name?***'
    """
    for pattern in _MASKED:
        text = pattern.sub(rf"\1{_MASK}", text)
    return text
