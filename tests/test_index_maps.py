"""The families' index maps, tested from the dense matrix alone: block ranks, rearrangements, supports."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import einlinear as el


def matrix(spec: str, in_features: int, out_features: int) -> tuple[Tensor, dict[str, int]]:
    torch.manual_seed(0)
    layer = el.Linear(in_features, out_features, spec, dtype=torch.float64)
    return layer.dense_weight().detach(), dict(layer.structure.sizes)


def rank(w: Tensor) -> int:
    return int(torch.linalg.matrix_rank(w, rtol=1e-10))


SHAPES = [(64, 64), (36, 144), (144, 36), (48, 80)]


@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_low_rank(in_features: int, out_features: int) -> None:
    assert rank(matrix("low_rank(rank=5)", in_features, out_features)[0]) == 5
    assert rank(matrix("low_rank", in_features, out_features)[0]) == -(-(min(in_features, out_features) ** 0.5) // 1)


@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
@pytest.mark.parametrize("terms", [1, 2, 3])
def test_kronecker_and_tt_are_sums_of_kronecker_products(terms: int, in_features: int, out_features: int) -> None:
    """W[(e d), (b a)] = sum_r A_r[d, a] B_r[e, b]: rearranged to rows (d a) and columns (e b), W has rank r."""
    w, n = matrix("kronecker" if terms == 1 else f"tt(rank={terms})", in_features, out_features)
    blocks = w.view(n["e"], n["d"], n["b"], n["a"])
    assert rank(blocks.permute(1, 3, 0, 2).reshape(n["d"] * n["a"], -1)) == terms
    if terms == 1:
        a = blocks[0, :, 0, :]
        b = blocks[:, 0, :, 0] / blocks[0, 0, 0, 0]
        torch.testing.assert_close(torch.kron(b, a), w)  # torch.kron: the first factor's axes are outer


@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
@pytest.mark.parametrize("r", [1, 2])
def test_btt_blocks_have_the_rank(r: int, in_features: int, out_features: int) -> None:
    """in = g a, out = f e: every W[f, :, g, :] has rank r, and the whole has more."""
    w, n = matrix(f"btt(rank={r})", in_features, out_features)
    blocks = w.view(n["f"], n["e"], n["g"], n["a"])
    assert {rank(blocks[f, :, g]) for f in range(n["f"]) for g in range(n["g"])} == {r}
    assert rank(w) == min(in_features, out_features)


@pytest.mark.parametrize(("in_features", "out_features"), [(64, 64), (64, 128), (128, 64), (256, 64)])
@pytest.mark.parametrize("blocks", [2, 4])
def test_monarch_residues_have_the_rank(blocks: int, in_features: int, out_features: int) -> None:
    """out = e f (f fastest), in = g a: every W[:, f, g, :] has rank min(in, out) / blocks^2."""
    w, _ = matrix(f"monarch(blocks={blocks})", in_features, out_features)
    four = w.view(out_features // blocks, blocks, blocks, in_features // blocks)
    ranks = {rank(four[:, f, g]) for f in range(blocks) for g in range(blocks)}
    assert ranks == {min(in_features, out_features) // blocks**2}


@pytest.mark.parametrize(("in_features", "out_features"), [(32, 32), (32, 64), (64, 24)])
@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("variant", ["it", "ot", "dt"])
def test_dyad_support(variant: str, n: int, in_features: int, out_features: int) -> None:
    """W1[i d_o + o, i d_i + k], plus W2 with k n + i for the input (it, dt) and o n + i for the output (ot, dt)."""
    w, _ = matrix(f"dyad(blocks={n}, variant={variant})", in_features, out_features)
    d_in, d_out = in_features // n, out_features // n
    support = torch.zeros_like(w, dtype=torch.bool)
    for i in range(n):
        for o in range(d_out):
            for k in range(d_in):
                support[i * d_out + o, i * d_in + k] = True
                row = o * n + i if variant in ("ot", "dt") else i * d_out + o
                column = k * n + i if variant in ("it", "dt") else i * d_in + k
                support[row, column] = True
    assert torch.equal(w != 0, support)


def test_block_diagonal_support() -> None:
    w, _ = matrix("block_diagonal(blocks=4)", 32, 64)
    assert torch.equal(w != 0, torch.block_diag(*[torch.ones(16, 8, dtype=torch.bool)] * 4).bool())


def test_blast_blocks() -> None:
    """Block (i, j) is U_i diag(s_ij) V_j^T: the row space of a block row and the column space are shared."""
    w, _ = matrix("blast(blocks=4, rank=3)", 64, 128)
    blocks = w.view(4, 32, 4, 16)
    assert {rank(blocks[i, :, j]) for i in range(4) for j in range(4)} == {3}
    assert {rank(blocks[i].reshape(32, -1)) for i in range(4)} == {3}  # one U_i for all j
    assert {rank(blocks[:, :, j].reshape(128, -1)) for j in range(4)} == {3}  # one V_j for all i
    # blocks of one row and column share both bases: with U_0 and V_0 fixed, the blocks (0, 0) and (1, 0) are diagonal
    # in the same right basis, so pinv(W00) W0j ... commute for all pairs
    left = [torch.linalg.pinv(blocks[i, :, 0], rtol=1e-10) @ blocks[i, :, 0] for i in range(4)]
    for projector in left[1:]:
        torch.testing.assert_close(projector, left[0])


@pytest.mark.parametrize(
    "theta", [(1 / 2, 1 / 4, 1 / 4, 1 / 4, 1 / 2, 1 / 4, 1 / 4), (1 / 2, 0, 1 / 2, 0, 1 / 2, 1 / 2, 0)]
)
def test_einsum_blocks_have_the_rank(theta: tuple[float, ...]) -> None:
    """W[(f e d), (g b a)] = sum_r B[f, e, r, g, b] A[f, d, r, g, a]: per (g, f), rows (d a), columns (e b), rank r."""
    s = el.structure("einsum", 256, 256, theta=theta)
    w, n = matrix(s.spec, 256, 256)
    six = w.view(n["f"], n["e"], n["d"], n["g"], n["b"], n["a"])
    for f in range(n["f"]):
        for g in range(n["g"]):
            assert rank(six[f, :, :, g].permute(1, 3, 0, 2).reshape(n["d"] * n["a"], -1)) == n["r"]


def test_named_structures_are_points_of_the_einsum_family() -> None:
    """Kronecker and balanced BTT of rank 1 are single thetas: the same matrix from the same factors."""
    for spec, theta in (
        ("kronecker", (1 / 2, 1 / 2, 0, 1 / 2, 1 / 2, 0, 0)),
        ("btt", (1 / 2, 0, 1 / 2, 0, 1 / 2, 1 / 2, 0)),
    ):
        named = el.Linear(64, 64, spec, dtype=torch.float64)
        point = el.Linear(64, 64, el.structure("einsum", 64, 64, theta=theta), dtype=torch.float64)
        with torch.no_grad():
            for mine, theirs in zip(point.factors(), named.factors(), strict=True):
                mine.copy_(theirs.reshape(mine.shape))
        torch.testing.assert_close(point.dense_weight(), named.dense_weight())


def test_btt_of_many_cores_is_a_butterfly() -> None:
    """Every factor mixes one bit of the index: for 2^k features k factors of 2 * 2^k numbers, and full rank."""
    s = el.structure("btt(cores=5)", 32, 32)
    assert [f.params for f in s.factors] == [64] * 5
    assert s.rank == rank(matrix("btt(cores=5)", 32, 32)[0]) == 32
