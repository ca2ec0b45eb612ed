"""Integer formats: packing is exact, and bytes are those of the packed tensors."""

from __future__ import annotations

import pytest
import torch

from einlinear.ops.integer_format import SCALE_DTYPE, IntegerFormat


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 2, 7, 8, 33])
def test_packing_is_exact(bits: int, columns: int) -> None:
    format = IntegerFormat(bits)
    codes = torch.randint(-format.largest - 1, format.largest + 1, (2, 40, columns), dtype=torch.int8)
    packed = format.pack(codes)
    assert (packed.dtype, packed.shape) == (torch.uint8, (2, 40, format.code_bytes(columns)))
    unpacked = format.unpack(packed, columns)
    assert unpacked.dtype == torch.int8
    assert torch.equal(unpacked, codes)


@pytest.mark.parametrize(("bits", "expected"), [(8, 64), (4, 32), (3, 24), (2, 16)])
def test_bytes(bits: int, expected: int) -> None:
    format = IntegerFormat(bits, 32)
    assert format.code_bytes(64) == expected
    assert format.nbytes(10, 64) == 10 * (expected + 2 * SCALE_DTYPE.itemsize)
    assert IntegerFormat(bits).nbytes(10, 64) == 10 * (expected + SCALE_DTYPE.itemsize)


def test_two_codes_are_one_byte() -> None:
    assert IntegerFormat(4).pack(torch.tensor([[-8, 7, 0]])).tolist() == [[0xF0, 0x08]]


def test_the_last_group_may_be_shorter() -> None:
    format = IntegerFormat(4, 3)
    scales = torch.tensor([[1.0, 2.0, 4.0]])
    assert format.groups(7) == 3
    assert format.decode(torch.ones(1, 7), scales).tolist() == [[1, 1, 1, 2, 2, 2, 4]]


def test_text() -> None:
    for text in ("int8", "int4(group=32)"):
        assert str(IntegerFormat.parse(text)) == text
    for wrong in ("int", "fp8", "int4(32)", "int4 ", "int4(group=0)", "int9", "int1"):
        with pytest.raises(ValueError, match=r"format|group"):
            IntegerFormat.parse(wrong)
