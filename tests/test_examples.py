"""The scripts in examples/ and benchmarks/ run from beginning to end, on the least there is."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import einlinear as el
from einlinear_lab.sweeps.sweep import read_sweep
from tests.lab.cli.command import run
from tests.lab.data.samples import needs, prose

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_dense_to_sparse(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(prose(2000))
    code, _, err = run("prepare", tmp_path / "text.txt", "--out", tmp_path / "tokens")
    assert (code, err) == (0, "")
    command = [sys.executable, ROOT / "examples" / "dense_to_sparse.py", "--data", tmp_path / "tokens"]
    command += ["--width", "64", "--depth", "1", "--steps", "24", "--out", tmp_path / "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    tables = [
        subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True, env=environment).stdout
        for _ in range(2)
    ]
    assert tables[0] == tables[1]  # all of it is kept
    rows = re.findall(r"^\| ([a-z-]+) \| ([\d.]+) \| ([\d,]+) \| [\d.]+ \| [\d–]+ \|$", tables[0], re.MULTILINE)
    assert [name for name, *_ in rows] == ["dense", "monarch", "sparse-to-dense", "dense-to-sparse"]
    macs = {name: int(count.replace(",", "")) for name, _, count in rows}
    assert macs["sparse-to-dense"] == macs["dense"]
    assert macs["dense-to-sparse"] < 1.1 * macs["monarch"] < macs["dense"]


def test_compare_compression(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(prose(2000))
    assert run("prepare", tmp_path / "text.txt", "--out", tmp_path / "tokens")[0] == 0
    options = [f"data={tmp_path / 'tokens'}", "model=gpt", "width=64", "d_head=32", "depth=2", "context=32", "steps=2"]
    assert run("train", *options, "--out", tmp_path / "gpt")[0] == 0
    command = [sys.executable, ROOT / "examples" / "compare_compression.py", "gpt", "--run", tmp_path / "gpt"]
    command += ["--out", tmp_path / "rows.jsonl", "--sizes", "0.6", "--bytes", "0.15", "--calibrated", "32"]
    command += ["--tested", "8", "--characters", "5", "--rounds", "1", "--distill", "0.001"]
    methods = ["int4", "int8_dynamic", "svd_llm", "drop_blocks", "modegpt", "low_rank", "bytes, dense"]
    command += ["--methods", *methods]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    tables = [
        subprocess.run(
            list(map(str, command)), capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
        ).stdout
        for _ in range(2)
    ]
    assert tables[0].endswith(tables[1].partition("\n")[2])  # all of it is kept
    rows = re.findall(r"^\| ([\w, ]+) \| (\d+)% \| ([\d.]+)% \| [\d.]+ \| ([\d.]+|–) \|", tables[1], re.MULTILINE)
    kept = {name: (int(params), float(size)) for name, params, size, _ in rows}
    assert sorted(kept) == sorted(["dense", *methods])
    assert kept["drop_blocks"] == (50, 50.0)
    for name in ("svd_llm", "modegpt", "low_rank"):
        assert 50 < kept[name][1] <= 60
    assert kept["int4"][1] == 14.1
    assert kept["bytes, dense"][1] <= 15
    assert {name for name, *_, distilled in rows if distilled == "–"} == {"dense", "int8_dynamic"}


@needs("transformers")
def test_compression_baselines(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BertConfig, BertModel

    spec = importlib.util.spec_from_file_location("baselines", ROOT / "examples" / "compression_baselines.py")
    assert spec is not None
    assert spec.loader is not None
    baselines = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "baselines", baselines)  # dataclasses look there
    spec.loader.exec_module(baselines)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    model = BertModel(BertConfig(**sizes, vocab_size=100)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    names = [f"attention.self.{name}" for name in ("query", "key", "value")]
    names += ["attention.output.dense", "intermediate.dense", "output.dense"]
    layout = baselines.Layout("encoder.layer", *names, heads=4, attention="attention.self")
    batches = [{"input_ids": torch.randint(100, (16, 20)), "attention_mask": torch.ones(16, 20)} for _ in range(4)]
    batches[0]["attention_mask"][:, 12:] = 0

    def call(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**batch).last_hidden_state

    statistics = baselines.collect(model, layout, batches, call)
    y = call(model, batches[0])
    weight, moment = model.encoder.layer[0].output.dense.weight, statistics.second_moments[0, "output.dense"]
    errors = {}
    for name, method in baselines.SIZED.items():
        smaller = method(model, layout, 0.5, statistics)
        share = baselines.bytes_of(baselines.weights_in_blocks(smaller, layout))
        share /= baselines.bytes_of(baselines.weights_in_blocks(model, layout))
        assert share == pytest.approx(2 / 3 if name == "drop_blocks" else 0.5, abs=0.02)
        assert call(smaller, batches[0]).shape == y.shape
        if name.startswith(("svd", "asvd")):
            first, second = smaller.encoder.layer[0].output.dense
            change = (weight - second.weight @ first.weight).detach().double()
            errors[name] = float((change @ moment * change).sum())
    assert errors["svd_llm"] < 0.9 * min(errors["asvd"], errors["svd"])  # the least of this rank
    # the whole width: only the ridge of the feed-forward blocks changes the model
    torch.testing.assert_close(call(baselines.modegpt(model, layout, 1.0, statistics), batches[0]), y, atol=0.5, rtol=0)
    block = model.encoder.layer[0]
    up, down = block.intermediate.dense, block.output.dense
    with torch.no_grad():
        up.weight[96:], up.bias[96:] = 0, 0
    moment = baselines.collect(model, layout, batches, call).second_moments[0, "output.dense"]
    narrow_up, narrow_down = baselines.narrow_feed_forward(up, down, 0.5, moment)
    chosen = torch.tensor([int((up.weight == row).all(1).nonzero()[0, 0]) for row in narrow_up.weight])
    assert len(chosen.unique()) == 64
    assert chosen.max() < 96  # features that are always 0 go first
    refitted, cut = torch.zeros(2, 64, 128).double()
    refitted[:, chosen], cut[:, chosen] = narrow_down.weight.detach().double(), down.weight.detach()[:, chosen].double()
    changes = [down.weight.detach() - smaller for smaller in (refitted, cut)]
    errors = [float((change @ moment * change).sum()) for change in changes]
    assert errors[0] < 0.5 * errors[1]
    for name, largest in (("bfloat16", 2**-6), ("int8", 2**-7), ("int4", 2**-3), ("int8_dynamic", 2**-6)):
        rounded = baselines.ROUNDED[name](model, layout).encoder.layer[0].output.dense
        identity = torch.eye(128, dtype=torch.bfloat16 if name == "bfloat16" else torch.float32)
        found = (rounded(identity) - rounded(0 * identity)).T.float()
        assert 0 < (found - down.weight).abs().max() < largest * down.weight.abs().max()


@needs("transformers")
@needs("accelerate")
@needs("lightning")
def test_trainers(tmp_path: Path) -> None:
    """The same steps in every trainer: each one keeps the groups, clips the gradients and scales the rates."""
    command = [sys.executable, str(ROOT / "examples" / "trainers.py"), "transformers", "accelerate", "lightning"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path).stdout
    rows = re.findall(r"^\| (\w+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", out, re.MULTILINE)
    assert [name for name, *_ in rows] == ["transformers", "accelerate", "lightning"]
    rates, first, last = (list(map(float, column)) for column in list(zip(*rows))[1:])
    assert rates == 3 * [5]
    assert first == pytest.approx(3 * first[:1], rel=1e-3)
    assert last == pytest.approx(3 * last[:1], rel=1e-2)
    assert last[0] < 0.5 * first[0]
    assert not list(tmp_path.iterdir())


@needs("transformers")
def test_compressed_speed() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "compressed_speed.py"), "--tokens", "8", "--rounds", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    out = subprocess.run(
        [*command, "--layers", "1"], capture_output=True, text=True, check=True, env=environment
    ).stdout
    rows = re.findall(r"^\| [^|]+ \| ([^|]+) \| (\d+)% \| [\d,]+ \| [\d.]+ \| (–|[\d,.]+) \| (–|[\d.]+) \|$", out, re.M)
    assert len(rows) == 2 * (1 + 4 * 3)
    assert [row[2] == "–" for row in rows] == [True] * 13 + [False] * 13  # an encoder generates nothing


@pytest.mark.slow
@needs("transformers")
def test_compression_memory() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "compression_memory.py"), "--vocabulary", "40000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert re.findall(r"^\| ([^|]+) \| \d+ \| [\d.]+ \|$", out, re.M) == [
        "forward pass",
        "`el.compress`",
        "`el.distill`",
    ]


@needs("transformers")
def test_converted_speed() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "converted_speed.py"), "--layers", "1", "--rounds", "1"]
    command += ["--hidden", "64"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert len(re.findall(r"^\| [^|]+ \| [\d.]+ \| [\d.]+ \| [\d.]+ \|$", out, re.M)) == 7


@needs("transformers")
def test_fused_speed() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "fused_speed.py"), "--hidden", "64", "--rounds", "1"]
    command += ["--layers", "1", "--tokens", "32"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert (
        len(re.findall(r"^\| 64 \| \w+ \| `btt` \| (MLP|model) \| [^|]+ \|( [\d.]+ \|){3} [\d.]+x \|$", out, re.M)) == 8
    )


@pytest.mark.parametrize("name", ["mlp", "pixels", "english"])
def test_training_time(name: str) -> None:
    runs = read_sweep(ROOT / "benchmarks" / "training_time" / f"{name}.toml").runs
    assert len({run.model.width for run in runs if run.model.structure == "dense"}) >= 5
    assert {run.model.structure for run in runs} == {"dense", "btt", "monarch(blocks=4)", "low_rank"}


def test_call_overhead() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "call_overhead.py"), "--features", "64", "--rounds", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert (
        len(re.findall(r"^\| 64 \| `[a-z_]+.*` \| (inference|training) \| [\d.]+ \| [\d.]+ \| [\d.]+ \|$", out, re.M))
        == 10
    )
    command += ["--shared-input", "--tokens", "1", "2048"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    rows = re.findall(r"^\| 64 \| (\d+) \| `([a-z_]+)\S* \| (\w+) \| \d+ \| \d+ \| [\d.]+ \| (\w+) \|$", out, re.M)
    assert len(rows) == 20
    assert {kind for tokens, *_, kind in rows if tokens == "1"} == {"apart"}
    if el.ops.reason_unsupported("cpu", el.structure("btt", 64, 64), torch.float32, "cpu") is None:
        assert {kind for tokens, *_, kind in rows if tokens == "2048"} == {"stacked"}


def test_step_profile() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "step_profile.py"), "--widths", "64", "--structures", "btt"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    out = subprocess.run(
        [*command, "--rounds", "1", "--steps", "1"], capture_output=True, text=True, check=True, env=environment
    ).stdout
    rows = re.findall(r"^\| (\w+) \| 64 \| `btt` \| ([\d. |-]+) \|$", out, re.M)
    assert [name for name, _ in rows] == ["mlp", "vit", "gpt"]
    for name, cells in rows:
        step, data, optimizer, normalisation, products, *others = map(float, cells.split(" | "))
        assert min(data, optimizer, products) > 0
        assert (normalisation > 0) == (name == "gpt")
        assert data + optimizer + normalisation + products + sum(others) == pytest.approx(step, rel=0.02, abs=1)


@needs("onnxruntime")
@needs("onnxscript")
def test_exported_speed() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "exported_speed.py"), "--features", "256", "--rounds", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    rows = re.findall(r"^\| 256 \| `([a-z_]+).*` \| \d, \d \| [\d.]+× \| [\d.]+× \|$", out, re.M)
    assert rows == ["low_rank", "btt", "monarch", "dyad"]


@needs("transformers")
def test_tied_heads() -> None:
    """As a head a tied weight changes the logits alike at all widths, as an embedding the more the wider it is."""
    command = [sys.executable, str(ROOT / "benchmarks" / "tied_heads.py"), "--widths", "64", "256"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    growth = [float(wide) / float(narrow) for narrow, wide in re.findall(r"([\d.]+) \| ([\d.]+) \|$", out, re.M)]
    assert [ratio > 2 for ratio in growth] == [True, False, True, False, False]


@pytest.mark.slow
def test_search_regret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("search_regret", ROOT / "benchmarks" / "search_regret.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert len(example.paper_specs()) == 23
    monkeypatch.setattr(example, "paper_specs", lambda every=example.paper_specs: every()[:3])
    for method in ("random", "gp", "tpe", "tpe, warm start, pruned"):
        del example.METHODS[method]
    words = ["--data", "digits", "--budget", "30000", "--steps", "4", "--runs", "4", "--repeats", "2", "--workers", "1"]
    monkeypatch.setattr(sys, "argv", ["search_regret.py", *words, "--out", str(tmp_path / "out")])
    example.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| MACs, in complete runs | gp, warm start, pruned | the paper's 23 |"
    assert lines[2].startswith("| 4 | ")
    regrets = [[float(number) for number in cell.split(" ± ")] for cell in lines[2].split(" | ")[1:-1]]
    assert min(mean for mean, _ in regrets) >= 0
    assert (tmp_path / "out" / "regret.html").exists()
    example.main()  # nothing is trained again
    assert capsys.readouterr().out.splitlines() == lines
