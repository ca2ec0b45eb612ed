"""`einlinear describe`."""

import pytest
from tests.lab.cli.command import assert_refused, run

import einlinear as el
from einlinear.mup.factor_multipliers import adam_multipliers
from einlinear.structures.initialization import init_std


def test_describe_against_numbers_worked_out_here() -> None:
    code, out, _ = run("describe", "btt(rank=2)", 1024, 4096)
    assert code == 0
    blocks_in = inner_in = 32  # 1024 = 32 · 32
    blocks_out = inner_out = 64  # 4096 = 64 · 64
    a = blocks_in * 2 * blocks_out * inner_in
    b = blocks_out * inner_out * blocks_in * 2
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    std_a, std_b = inner_in**0.5 / inner_in, inner_out**0.5 / (2 * blocks_in)
    row_a = ["32×2×64×32", "32", "128", f"{a:,}", f"{a:,}", f"{std_a:.4g}", f"{1024 / 32 / 2:g}×"]
    row_b = ["64×64×32×2", "64", "64", f"{b:,}", f"{b:,}", f"{std_b:.4g}", f"{1024 / 64 / 2:g}×"]
    assert lines["A"] == ["A", "g", "r", "f", "a", *row_a]
    assert lines["B"] == ["B", "f", "e", "g", "r", *row_b]
    assert lines["params"] == ["params", f"{a + b:,}", f"{1024 * 4096:,}", "0.09375"]
    assert lines["MACs"][1:] == lines["params"][1:]
    assert lines["rank"] == ["rank", "1,024", "1,024", "1"]
    assert [lines[name][-2:] for name in ("psi", "nu", "omega")] == [["1", "1"], ["0.5", "1"], ["0", "0"]]
    assert "(g a), g r f a, f e g r -> (f e)" in out


@pytest.mark.parametrize("spec", ["dyad(variant=dt)", "tt(rank=3, cores=3)", "blast(blocks=4, rank=2)"])
def test_describe_shows_every_factor(spec: str) -> None:
    s = el.structure(spec, 64, 128)
    _, out, _ = run("describe", spec, 64, 128)
    for factor, std, multiplier in zip(s.factors, init_std(s), adam_multipliers(s), strict=True):
        words = next(line.split() for line in out.splitlines() if line.startswith(f"{factor.name} "))
        assert words[-2:] == [f"{std:.4g}", f"{multiplier:.4g}×"]
        assert "×".join(map(str, factor.shape)) in words


def test_describe_the_plan() -> None:
    _, out, _ = run("describe", "btt", 64, 64, "--plan", "--tokens", 1)
    assert "Backend for 1 inputs" in out
    assert "a dense layer would be faster" in out
    assert "A  batch (g), contracted (a), free (tokens), new (r f): (tokens g a) -> (g r f tokens)" in out
    assert "Backend" not in run("describe", "btt", 64, 64)[1]


def test_describe_the_sharding() -> None:
    _, out, _ = run("describe", "low_rank(rank=8)", 64, 128, "--sharding", "--devices", 4)
    lines = {line.split()[0]: " ".join(line.split()) for line in out.splitlines() if line.strip()}
    # (8 * 64 + 8 * 128 / 4) / (8 * 192), and (8 * 64 / 4 + 8 * 128) / (8 * 192)
    assert lines["Colwise"] == "Colwise o B (o) A 50% 8, backward 0"
    assert lines["Rowwise"] == "Rowwise i A (i) B 75% 8, forward 0"
    _, out, _ = run("describe", "tt", 64, 64, "--sharding", "--devices", 3)
    assert "Colwise: tt, 64 -> 64: 3 devices cannot share the axis 'e'" in out
    assert "Tensor parallelism" not in run("describe", "tt", 64, 64)[1]


def test_describe_with_a_budget() -> None:
    _, out, _ = run("describe", "btt", 1024, 4096, "--max-macs", 0.25)
    assert out.startswith("btt(rank=5), 1024 -> 4096")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("monrch", 64, 64), "Did you mean 'monarch'"),
        (("btt", 0, 64), "at least 1"),
        (("dense", 64, 64, "--max-macs", 0.5), "too small"),
    ],
)
def test_describe_refuses(arguments: tuple[object, ...], message: str) -> None:
    assert_refused(run("describe", *arguments), message)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("low_rank(rank=1e400)", "a number must be at most 1e+30, not inf"),
        ("tt(cores=3000)", "tt: cores must be at most 31, not 3000"),
        ("btt(rank=" + "-" * 5000 + "1)", "nested more than 20 times"),
        ("i, o i -> o" + " " * 50_000, "at most 10,000 characters"),
    ],
    ids=["rank", "cores", "signs", "length"],
)
def test_hostile_text_is_refused(spec: str, message: str) -> None:
    assert_refused(run("describe", spec, 64, 64), message)
