"""`einlinear compress`: a folder in, a smaller one out, or nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.command import assert_refused, run
from tests.data.samples import needs, prose
from typer.testing import CliRunner

import einlinear as el
from einlinear.cli import packages
from einlinear.cli.app import app

pytestmark = needs("transformers")

OPTIONS = ("--structures", "low_rank; btt", "--samples", "8", "--tokens", "16", "--batch-size", "4")


def tokenizer_of(text: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *sorted(set(re.findall(r"\w+|[^\w\s]+", text)))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(prose(40))
    return tmp_path / "text.txt"


@pytest.fixture(params=["bert", "gpt2"])
def source(request: pytest.FixtureRequest, text: Path, tmp_path: Path) -> Path:
    """A model that reads, or one that writes."""
    from tests.huggingface.models import MODELS

    tokenizer = tokenizer_of(text.read_text())
    torch.manual_seed(0)
    model: Any = MODELS[request.param]()
    model.resize_token_embeddings(len(tokenizer))
    for folder in (model, tokenizer):
        folder.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_what_comes_out_is_loaded_as_any_model(source: Path, text: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    code, out, err = run(
        "compress", source, "--out", tmp_path / "out", "--keep-params", 0.6, *OPTIONS, "--calibration", text
    )
    assert (code, err) == (0, "")
    model = AutoModel.from_pretrained(tmp_path / "out")
    structured = {name: layer for name, layer in model.named_modules() if isinstance(layer, el.Linear)}
    report = json.loads((tmp_path / "out" / "compression.json").read_text())
    changed = [layer for layer in report["layers"] if layer["structure"] != "dense"]
    assert {layer.structure.spec for layer in structured.values()} == {layer["structure"] for layer in changed}
    assert sum(layer["params"] for layer in report["layers"]) <= 0.6 * sum(l["params_before"] for l in report["layers"])
    assert all(layer["name"] in out for layer in report["layers"])
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("she read", return_tensors="pt")
    assert model(**ids).last_hidden_state.isfinite().all()
    assert re.search(r"original +[\d,]+ +1\.00", out)
    assert re.match(r"looking at the model: 0 of 1 \(\d+ s\)\n", out)  # in a file or pipe there are lines, not bars
    assert re.search(r"^comparing structures: 0 of \d+ \(\d+ s\)$", out, re.MULTILINE)
    assert len(re.findall(r"^\w[\w ]+: [\d,]+ of \d+ \(\d+ s\)$", out, re.MULTILINE)) < 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "text.txt"]


@pytest.mark.parametrize("source", ["gpt2"], indirect=True)
def test_macs_healing_and_no_calibration(source: Path, text: Path, tmp_path: Path) -> None:
    code, out, err = run("compress", source, "--out", tmp_path / "a", "--keep-macs", 0.6, *OPTIONS)
    assert (code, err) == (0, "")
    assert "lm_head is the output head" in out or "lm_head is tied" in out or "Left as it was: lm_head" in out
    heal = ("--calibration", text, "--heal", 0.02, "--parallel", "--only-if-faster")
    code, out, err = run("compress", source, "--out", tmp_path / "b", "--keep-params", 0.6, *OPTIONS, *heal)
    assert (code, err) == (0, "")
    assert re.search(r"Healed in [\d,]+ steps: the loss of a batch was", out)


@pytest.mark.parametrize("source", ["bert"], indirect=True)
def test_interrupted_it_leaves_no_model_and_goes_on(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from einlinear.compression import compress, pretrained

    arguments = ("compress", source, "--out", tmp_path / "out", "--keep-params", 0.6, *OPTIONS, "--calibration", text)
    write = pretrained.write_json

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrained, "write_json", interrupted)  # the weights are written then
    code, _, err = run(*arguments)
    assert code == 130
    assert f"so far: {tmp_path / 'out.unfinished'}" in err
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(pretrained, "write_json", write)
    (source / "preprocessor_config.json").write_text('{"size": 1}')
    monkeypatch.setattr(
        compress.__globals__["_Task"], "_candidates", lambda *_: pytest.fail("what was compared is compared again")
    )
    code, _, err = run(*arguments)
    assert (code, err) == (0, "")
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"size": 1}'
    assert not (tmp_path / "out.unfinished").exists()


@pytest.mark.parametrize("source", ["gpt2"], indirect=True)
def test_healing_goes_on(source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from einlinear import checkpoint, compression

    heal = compression.heal

    def often(*args: Any, **kwargs: Any) -> compression.Healing:
        return heal(*args, **kwargs, checkpoint_every=0)

    steps: list[int] = []
    save = checkpoint.save

    def interrupted(folder: Path, state: checkpoint.Checkpoint) -> Path:
        steps.append(state.step)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return save(folder, state)

    monkeypatch.setattr(compression, "heal", often)
    monkeypatch.setattr(checkpoint, "save", interrupted)
    command = ("compress", source, "--out", tmp_path / "out", "--keep-params", 0.6, *OPTIONS, "--calibration", text)
    code, _, err = run(*command, "--heal", 0.02)
    assert code == 130
    assert "The same command goes on" in err
    assert not (tmp_path / "out").exists()
    code, out, err = run(*command, "--heal", 0.02)
    assert (code, err) == (0, "")
    assert steps[:4] == [1, 2, 3, 3]
    assert f"Healed in {steps[-1]:,} steps" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "text.txt"]


@pytest.mark.parametrize("source", ["bert"], indirect=True)
@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"--keep-params": None}, ["give either --keep-params or --keep-macs"]),
        ({"--keep-macs": 0.5}, ["give either --keep-params or --keep-macs"]),
        ({"--keep-params": 0.001}, ["0.001 of the", "params of", "cannot be reached with low_rank, btt"]),
        ({"--structures": "lowrank"}, ["unknown family 'lowrank'. Did you mean 'low_rank'"]),
        ({"--heal": 1}, ["--heal needs text to train on"]),
        ({"--device": "tpu9"}, ["device 'tpu9' cannot be used"]),
        ({"--heal": 1, "--calibration": "text.txt", "--dtype": "float16"}, ["float16 parameters cannot be trained"]),
        ({"--heal": 1, "--calibration": "text.txt", "--lr": 0}, ["--lr must be positive"]),
        ({"--out": "model"}, ["exists: name a folder that does not"]),
        ({"--calibration": "empty.txt"}, ["empty.txt holds no text"]),
        ({"--calibration": "none.txt"}, ["none.txt"]),
        ({"--layers": "nothing.*"}, ["layers: 'nothing.*' matches no linear layer"]),
        ({"MODEL": "text.txt"}, ["text.txt is not a model that transformers can load"]),
        ({"MODEL": "mistyped"}, ["there is no folder", "mistyped"]),
        ({"MODEL": "empty"}, ["empty is not a model that transformers can load"]),
    ],
)
def test_mistakes(source: Path, text: Path, tmp_path: Path, change: dict[str, Any], parts: list[str]) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "empty").mkdir()
    options: dict[str, Any] = {"--out": "out", "--keep-params": 0.5} | change
    model = tmp_path / options.pop("MODEL", "model")
    given = [
        part
        for option, value in options.items()
        if value is not None
        for part in (option, tmp_path / value if option in ("--out", "--calibration") else value)
    ]
    if "--structures" not in change:
        given += OPTIONS[:2]
    before = {path: path.read_bytes() for path in source.iterdir()}
    assert_refused(run("compress", model, *given), *parts)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.unfinished").exists()  # the corrected command would stumble over it
    assert {path: path.read_bytes() for path in source.iterdir()} == before


def test_models_that_take_pairs_of_texts(text: Path, tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 48, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    tokenizer_of(text.read_text()).save_pretrained(tmp_path / "t5")
    command = ("compress", tmp_path / "t5", "--keep-params", 0.6, *OPTIONS[:2], "--out")
    answer = run(*command, tmp_path / "out", "--calibration", text)
    assert_refused(answer, "T5ForConditionalGeneration takes pairs of texts", "call el.compress in Python")
    code, _, err = run(*command, tmp_path / "out")
    assert (code, err) == (0, "")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda module: None if module == "scipy" else module)
    result = CliRunner().invoke(app, ["compress", "model", "--out", "out"])
    assert "not installed (scipy). Install them with:  pip install 'einlinear[pretrained]'" in str(result.exception)
