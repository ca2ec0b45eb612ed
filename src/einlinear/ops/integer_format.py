"""Integer formats of weights: signed codes of a few bits, and one scale for each row or each group of its columns.

An entry is its code times its scale. Codes are packed into bytes; scales are bfloat16, which has the range of float32.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class IntegerFormat:
    """Codes of 2 to 8 bits, with one scale for each `group` consecutive columns of a row, or for each row.

    >>> IntegerFormat.parse("int4(group=32)").nbytes(384, 1536)
    331776
    """

    bits: int
    group: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"an integer format has 2 to 8 bits, not {self.bits}")
        if self.group is not None and self.group < 1:
            raise ValueError(f"a group has at least one column, not {self.group}")

    @classmethod
    def parse(cls, text: str) -> IntegerFormat:
        """Parse "int8", with one scale for each row, or "int4(group=32)"."""
        match = re.fullmatch(r"int(\d{1,3})(?:\(group=(\d{1,9})\))?", text)
        if match is None:
            raise ValueError(f"an integer format is written as 'int8' or 'int4(group=32)', not {text!r}")
        return cls(int(match[1]), None if match[2] is None else int(match[2]))

    def __str__(self) -> str:
        return f"int{self.bits}" + ("" if self.group is None else f"(group={self.group})")

    @property
    def largest(self) -> int:
        """The largest code; the smallest one is -largest - 1."""
        return int(2 ** (self.bits - 1) - 1)

    def groups(self, columns: int) -> int:
        """Return the number of scales of a row; its last group may have fewer columns."""
        return 1 if self.group is None else -(-columns // self.group)

    def nbytes(self, rows: int, columns: int) -> int:
        """Return the bytes of codes and scales of a matrix."""
        return rows * (self.code_bytes(columns) + SCALE_DTYPE.itemsize * self.groups(columns))

    def code_bytes(self, columns: int) -> int:
        """Return the bytes of a row's codes."""
        return sum(-(-columns * width // 8) for width, _ in self._parts())

    def by_column(self, scales: Tensor, columns: int) -> Tensor:
        """Repeat scales, (..., rows, groups), for every column: (..., rows, columns), or (..., rows, 1)."""
        return scales if self.group is None else scales.repeat_interleave(self.group, -1)[..., :columns]

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Return the matrices of codes, (..., rows, columns), and scales, (..., rows, groups), in float32."""
        return codes * self.by_column(scales.float(), codes.shape[-1])

    def pack(self, codes: Tensor) -> Tensor:
        """Return codes (..., columns) as bytes, (..., code_bytes(columns))."""
        unsigned = (codes.to(torch.int16) + self.largest + 1).to(torch.uint8)
        packed = []
        for width, shift in self._parts():
            shifts = torch.arange(0, 8, width, device=codes.device)
            part = (unsigned >> shift) & (2**width - 1)
            part = F.pad(part, (0, -codes.shape[-1] % len(shifts))).unflatten(-1, (-1, len(shifts)))
            packed.append((part << shifts).sum(-1, dtype=torch.uint8))
        return torch.cat(packed, -1)

    def unpack(self, packed: Tensor, columns: int) -> Tensor:
        """Return the codes, (..., columns) in int8, that `pack` made bytes of."""
        unsigned = torch.zeros((), dtype=torch.uint8, device=packed.device)
        sizes = [-(-columns * width // 8) for width, _ in self._parts()]
        for (width, shift), part in zip(self._parts(), packed.split(sizes, -1), strict=True):
            shifts = torch.arange(0, 8, width, device=packed.device, dtype=torch.uint8)
            codes = (part[..., None] >> shifts) & (2**width - 1)
            unsigned = unsigned + (codes.flatten(-2)[..., :columns] << shift)
        # exact, since 128 is added to and subtracted from numbers modulo 256
        return (unsigned - (self.largest + 1)).view(torch.int8)

    def _parts(self) -> Iterator[tuple[int, int]]:
        """Yield the widths of the parts in which codes are packed, which divide 8, and their lowest bits."""
        shift = 0
        for width in (8, 4, 2, 1):
            if self.bits & width:
                yield width, shift
                shift += width
