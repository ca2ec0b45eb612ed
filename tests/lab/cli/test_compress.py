"""`einlinear compress`: a folder in, a smaller one out, or nothing."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lab.cli.command import assert_refused, run, said_default
from tests.lab.data.samples import needs, prose
from typer.testing import CliRunner

import einlinear as el
from einlinear_lab.cli import packages
from einlinear_lab.cli.app import app

pytestmark = needs("transformers")

FEW = ("--samples", "8", "--max-length", "16", "--batch-size", "4")
OPTIONS = ("--structures", "low_rank; btt", *FEW)
LOW_RANK = ("--structures", "low_rank", *FEW)


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
    from tests.integrations.transformers.models import MODELS

    tokenizer = tokenizer_of(text.read_text())
    torch.manual_seed(0)
    model: Any = MODELS[request.param]()
    model.resize_token_embeddings(len(tokenizer))
    for folder in (model, tokenizer):
        folder.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_embeddings_that_are_named(source: Path, text: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    is_bert = json.loads((source / "config.json").read_text())["model_type"] == "bert"
    name, layer = ("word_embeddings", "*layer.0.intermediate.dense") if is_bert else ("wte", "*h.0.mlp.c_fc")
    options = ("--embeddings", f"*{name}", "--layers", layer, "--calibration", text, *LOW_RANK)
    # the table alone has more
    code, _, err = run("compress", source, "--out", tmp_path / "out", "--budget", 0.3, *options)
    assert (code, err) == (0, "")
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert isinstance(model.get_input_embeddings(), el.Embedding)
    report = json.loads((tmp_path / "out" / "compression.json").read_text())
    assert [layer["params"] for layer in report["layers"] if layer["name"].endswith(name)] == [
        model.get_input_embeddings().structure.params
    ]


def test_what_comes_out_is_loaded_as_any_model(source: Path, text: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    code, out, err = run(
        "compress", source, "--out", tmp_path / "out", "--budget", 0.6, *OPTIONS, "--calibration", text
    )
    assert (code, err) == (0, "")
    model = AutoModel.from_pretrained(tmp_path / "out")
    structured = {name: layer for name, layer in model.named_modules() if isinstance(layer, el.Linear)}
    report = json.loads((tmp_path / "out" / "compression.json").read_text())
    changed = [layer for layer in report["layers"] if layer["structure"] != "dense"]
    assert {layer.structure.spec for layer in structured.values()} == {layer["structure"] for layer in changed}
    assert sum(layer["params"] for layer in report["layers"]) <= 0.6 * sum(l["params_before"] for l in report["layers"])
    assert all(layer["name"] in out for layer in report["layers"])
    assert report["coverage"]["considered"] == sum(layer["params_before"] for layer in report["layers"])
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("she read", return_tensors="pt")
    assert model(**ids).last_hidden_state.isfinite().all()
    assert re.search(r"original +[\d,]+ +1\.00", out)
    assert re.search(
        r"^looking at the model: 0 of 1 \(\d+ s\)$", out, re.MULTILINE
    )  # in a file or pipe there are lines, not bars
    assert re.search(r"^comparing structures: 0 of \d+ \(\d+ s\)$", out, re.MULTILINE)
    assert len(re.findall(r"^\w[\w ]+: [\d,]+ of \d+ \(\d+ s\)$", out, re.MULTILINE)) < 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "text.txt"]


def test_stacked_experts(text: Path, tmp_path: Path) -> None:
    from tests.compression.test_experts import mixture

    model, tokenizer = mixture(), tokenizer_of(text.read_text())
    model.resize_token_embeddings(len(tokenizer))
    for folder in (model, tokenizer):
        folder.save_pretrained(tmp_path / "model")
    command = ("compress", tmp_path / "model", "--out", tmp_path / "out", "--budget", 0.6, *OPTIONS)
    code, _, err = run(*command, "--calibration", text, "--distill", 0.01)
    assert (code, err) == (0, "")
    report = json.loads((tmp_path / "out" / "compression.json").read_text())
    timed = {layer["name"].endswith("proj"): layer["speed_up"]["by_tokens"]["1"] for layer in report["layers"]}
    assert timed[False] is None
    assert timed[True] > 0


ONE = pytest.mark.parametrize("source", ["bert"], indirect=True)


@ONE
def test_one_that_was_killed_before_it_cleaned_up_is_complete(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("compress", source, "--out", tmp_path / "out", "--budget", 0.6, *OPTIONS)
    real = shutil.rmtree

    def killed(path: Path, *arguments: Any, **options: Any) -> None:
        if path.name == "out.unfinished":
            raise KeyboardInterrupt
        real(path, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        assert run(*command)[0] == 130
    (tmp_path / ".out.123").mkdir()  # of another that was killed
    assert (tmp_path / "out.unfinished").exists()
    assert_refused(run(*command, "--layers", "*"), "out exists: name a folder that does not")  # not the same command
    code, out, err = run(*command)
    assert (code, err) == (0, "")
    assert "out is complete" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "text.txt"]
    assert_refused(run(*command), "out exists: name a folder that does not")


@ONE
def test_two_do_not_write_one_folder(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one says so before it has done anything; the first one loses nothing."""
    from einlinear_lab.pretrained import model_folder

    command = ("compress", source, "--out", tmp_path / "new" / "out", "--budget", 0.6, *OPTIONS)
    load, second = model_folder.load, []

    def loading(*arguments: Any) -> Any:
        monkeypatch.setattr(model_folder, "load", load)
        second.append(run(*command))
        return load(*arguments)

    monkeypatch.setattr(model_folder, "load", loading)
    code, _, err = run(*command)
    assert (code, err) == (0, "")
    assert_refused(second[0], "another einlinear compress is at work on")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def pipeline_of(source: Path, text: Path, out: Path, place: str) -> Path:
    """A pipeline of sentence-transformers: a BERT in the subfolder `place`, mean pooling, a dense layer, norm 1."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    transformer = Transformer(str(source), max_seq_length=7)
    modules = [transformer, Pooling(32), Dense(32, 16), Normalize()]
    SentenceTransformer(modules=modules, prompts={"query": "read: "}).save_pretrained(str(out))
    (out / place).mkdir(exist_ok=True)
    if place:
        content = json.loads((out / "modules.json").read_text())
        content[0]["path"] = place
        (out / "modules.json").write_text(json.dumps(content))
        for path in [*out.iterdir()]:
            if path.is_file() and path.name not in ("modules.json", "config_sentence_transformers.json", "README.md"):
                path.rename(out / place / path.name)
    return out


@needs("sentence_transformers")
@pytest.mark.parametrize("source", ["bert"], indirect=True)
@pytest.mark.parametrize("place", ["", "0_Transformer"])
def test_a_sentence_transformer_stays_one(place: str, source: Path, text: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    folder = pipeline_of(source, text, tmp_path / "st", place)
    (folder / "assets" / "deep").mkdir(parents=True)
    (folder / "assets" / "deep" / "notes.txt").write_text("kept")
    original = SentenceTransformer(str(folder))
    command = ("compress", folder, "--out", tmp_path / "out", "--budget", 0.6, *OPTIONS)
    code, out, err = run(*command, "--calibration", text)
    assert (code, err) == (0, "")
    assert f"Not copied from {folder}: {place and place + '/'}model.safetensors." in out
    found = SentenceTransformer(str(tmp_path / "out"))
    assert [type(module) for module in found] == [type(module) for module in original]
    assert any(isinstance(layer, el.Linear) for layer in found[0].modules())
    assert found.max_seq_length == original.max_seq_length == 7
    assert found.prompts == original.prompts
    assert torch.equal(found[2].linear.weight, original[2].linear.weight)
    sentences = ["she read of the old house", "by the sea " * 20]
    before, after = (model.encode(sentences, convert_to_tensor=True) for model in (original, found))
    torch.testing.assert_close(after.norm(dim=1), torch.ones(2))
    assert (before * after).sum(1).min() > 0.5
    assert (tmp_path / "out" / "assets" / "deep" / "notes.txt").read_text() == "kept"
    assert (tmp_path / "out" / "README.md").read_text() == (folder / "README.md").read_text()


@needs("sentence_transformers")
@pytest.mark.parametrize("source", ["bert"], indirect=True)
@pytest.mark.parametrize("structures", ["narrow; low_rank", "narrow(uniform=True)"])
def test_a_narrow_sentence_transformer_stays_one(structures: str, source: Path, text: Path, tmp_path: Path) -> None:
    """With uniform sizes the config says them all, so that no other library is needed."""
    from sentence_transformers import SentenceTransformer

    folder = pipeline_of(source, text, tmp_path / "st", "")
    command = ("compress", folder, "--out", tmp_path / "out", "--budget", 0.6, *FEW)
    code, out, err = run(*command, "--structures", structures, "--calibration", text)
    assert (code, err) == (0, "")
    original, found = (SentenceTransformer(str(path)) for path in (folder, tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    needs_einlinear = structures != "narrow(uniform=True)"
    assert ("quantization_config" in config) == ("import einlinear" in out) == needs_einlinear
    sizes = [layer.intermediate.dense.out_features for layer in found[0].auto_model.encoder.layer]
    assert min(sizes) < 64
    before, after = (model.encode(["she read of the old house"], convert_to_tensor=True) for model in (original, found))
    assert (before * after).sum(1).min() > 0.3


def in_the_hubs_cache(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name under which a model is found on the hub, which is out of reach: its files are in the cache."""
    from huggingface_hub import constants

    root = cache / "models--someone--tiny"
    for path in filter(Path.is_file, folder.rglob("*")):
        link = root / "snapshots" / ("a" * 40) / path.relative_to(folder)
        blob = root / "blobs" / str(path.relative_to(folder)).replace("/", "-")
        for needed in (link, blob):
            needed.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(path.read_bytes())
        link.symlink_to(blob)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return "someone/tiny"


@pytest.mark.parametrize("source", ["bert"], indirect=True)
@pytest.mark.parametrize("place", ["", "0_Transformer"])
def test_a_pipeline_of_the_hub_is_kept(
    place: str, source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModel

    (tmp_path / "pipeline" / place).parent.mkdir(parents=True, exist_ok=True)
    source.rename(tmp_path / "pipeline" / place)
    (tmp_path / "pipeline" / "2_Dense").mkdir()
    (tmp_path / "pipeline" / "2_Dense" / "model.safetensors").write_text("its weights")
    (tmp_path / "pipeline" / "modules.json").write_text(json.dumps([{"path": place}, {"path": "2_Dense"}]))
    name = in_the_hubs_cache(tmp_path / "pipeline", tmp_path / "cache", monkeypatch)
    command = ("compress", name, "--out", tmp_path / "out", "--budget", 0.6, *OPTIONS)
    code, _, err = run(*command, "--calibration", text)
    assert (code, err) == (0, "")
    assert (tmp_path / "out" / "2_Dense" / "model.safetensors").read_text() == "its weights"
    assert (tmp_path / "out" / place / "tokenizer.json").is_file()
    model = AutoModel.from_pretrained(tmp_path / "out" / place)
    assert any(isinstance(layer, el.Linear) for layer in model.modules())
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def vit() -> Any:
    from tests.integrations.transformers.models import MODELS

    return MODELS["vit"]()


def wav2vec2() -> Any:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    convolutions = {"conv_dim": [8], "conv_kernel": [3], "conv_stride": [2], "num_conv_pos_embeddings": 4}
    return Wav2Vec2Model(Wav2Vec2Config(**sizes, **convolutions, num_conv_pos_embedding_groups=2))


@pytest.mark.parametrize("make", [vit, wav2vec2])
@pytest.mark.parametrize("weights", ["pickled", "sharded"])
def test_models_of_images_and_sound_keep_how_inputs_are_prepared(
    make: Callable[[], Any], weights: str, tmp_path: Path
) -> None:
    model, source = make(), tmp_path / "model"
    model.save_pretrained(source, max_shard_size="20KB" if weights == "sharded" else "1GB")
    if weights == "pickled":
        (source / "model.safetensors").unlink()
        torch.save(model.state_dict(), source / "pytorch_model.bin")
    (source / "preprocessor_config.json").write_text('{"do_resize": false}')
    code, _, err = run("compress", source, "--out", tmp_path / "out", "--budget", 0.7, *OPTIONS[:2])
    assert (code, err) == (0, "")
    assert [path.name for path in (tmp_path / "out").glob("*model*")] == ["model.safetensors"]
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"do_resize": false}'
    found = type(model).from_pretrained(tmp_path / "out")
    assert any(isinstance(layer, el.Linear) for layer in found.modules())


@pytest.mark.parametrize("source", ["gpt2"], indirect=True)
def test_macs_distillation_and_no_calibration(source: Path, text: Path, tmp_path: Path) -> None:
    code, out, err = run("compress", source, "--out", tmp_path / "a", "--budget", 0.6, "--count", "macs", *OPTIONS)
    assert (code, err) == (0, "")
    assert "lm_head is the output head" in out or "lm_head is tied" in out or "Left as it was: lm_head" in out
    distill = ("--calibration", text, "--distill", 0.02, "--no-sequential", "--only-if-faster")
    code, out, err = run("compress", source, "--out", tmp_path / "b", "--budget", 0.6, *OPTIONS, *distill)
    assert (code, err) == (0, "")
    assert re.search(r"Distilled in [\d,]+ steps: the loss of a batch was", out)


@pytest.mark.parametrize("source", ["gpt2"], indirect=True)
def test_options_of_distillation(source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from einlinear import compression

    distill, given = compression.distill, list[dict[str, Any]]()

    def noted(*args: Any, **kwargs: Any) -> compression.Distillation:
        given.append(kwargs)
        return distill(*args, **kwargs)

    monkeypatch.setattr(compression, "distill", noted)
    command = ("compress", source, "--budget", 0.3, "--count", "bytes", *OPTIONS)
    command += ("--calibration", text, "--distill", 0.01)
    code, out, err = run(*command, "--out", tmp_path / "a")
    assert (code, err) == (0, "")
    assert "Distilled in" in out
    more = ("--match", "none", "--train", "adapters", "--adapter-rank", 2, "--optimizer", "adamw")
    assert run(*command, "--out", tmp_path / "b", *more)[0] == 0
    more = ("--match", "transformer.h.0, transformer.h.1", "--match", "lm_head")
    assert run(*command, "--out", tmp_path / "c", *more)[0] == 0
    names = ("match", "train", "adapter_rank", "optimizer", "lr")
    assert [[kwargs[name] for name in names] for kwargs in given] == [
        [None, "all", 16, "muon", 1e-3],
        [(), "adapters", 2, "adamw", 3e-4],
        [("transformer.h.0", "transformer.h.1", "lm_head"), "all", 16, "muon", 1e-3],
    ]


def test_the_help_says_the_defaults_of_distillation() -> None:
    defaults = inspect.signature(el.distill).parameters
    for option in ("optimizer", "train", "adapter_rank"):
        assert said_default("compress", option) == str(defaults[option].default)


@pytest.mark.parametrize("source", ["gpt2"], indirect=True)
def test_a_budget_of_bytes_rounds_weights(source: Path, text: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "out"
    command = ("compress", source, "--out", folder, "--budget", 0.2, "--count", "bytes", "--calibration", text)
    code, out, err = run(*command, *OPTIONS)
    assert (code, err) == (0, "")
    assert "Quantisation alone at these bytes" in out
    found = AutoModelForCausalLM.from_pretrained(folder)
    rounded = [layer for layer in found.modules() if isinstance(layer, el.nn.QuantizedLinear)]
    before = sum(4 * layer.in_features * layer.out_features for layer in rounded)
    assert rounded
    assert sum(layer.nbytes for layer in rounded) < 0.3 * before


@pytest.mark.parametrize("source", ["bert"], indirect=True)
def test_a_budget_of_time(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(layers: Mapping[str, Any], tokens: int, stack_bytes: int) -> dict[str, float]:
        assert tokens == 3
        return {label: 1e-3 if label.startswith("dense") else 4e-4 for label in layers}

    monkeypatch.setattr("einlinear.compression.layer_timing.interleaved_seconds", seconds)
    command = (
        "compress",
        source,
        "--out",
        tmp_path / "out",
        "--budget",
        0.5,
        "--count",
        "time",
        "--tokens",
        3,
        *OPTIONS,
    )
    code, out, err = run(*command)
    assert (code, err) == (0, "")
    assert "x as fast, 3 tokens" in out
    assert re.search(r"The layers take [\d.]+ of [\d.]+ ms for 3 tokens: 4\d\.\d%\.", out)


@pytest.mark.parametrize("source", ["gpt2"], indirect=True)
def test_chats_calibrate_by_the_template(source: Path, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "she read"}, {"role": "assistant", "content": "the old house by the sea"}]
    rows = tmp_path / "chat.jsonl"
    rows.write_text(f"{json.dumps({'messages': chat})}\n" * 20)
    command = ("compress", source, "--budget", 0.6, *OPTIONS, "--calibration", rows, "--out", tmp_path / "out")
    assert_refused(run(*command), "chat.jsonl holds chats, but the model's tokenizer has no chat template")
    (source / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    code, out, err = run(*command)
    assert (code, err) == (0, "")
    assert f"Calibration: 20 rows with messages from {rows}, by the tokenizer's chat template." in out
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == (source / "chat_template.jinja").read_text()
    rows.write_text('{"conversations": []}\n')
    command = (*command[:-1], tmp_path / "other")
    assert_refused(run(*command), f"line 1 of {rows} has conversations; known are text, messages (a chat), or prompt")


@pytest.mark.parametrize("source", ["bert"], indirect=True)
def test_interrupted_it_leaves_no_model_and_goes_on(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from einlinear.compression import candidates, pipeline
    from einlinear_lab.pretrained import model_folder

    arguments = ("compress", source, "--out", tmp_path / "out", "--budget", 0.6, *OPTIONS, "--calibration", text)
    write = model_folder.write_json

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model_folder, "write_json", interrupted)  # the weights are written then
    code, _, err = run(*arguments)
    assert code == 130
    assert f"so far: {tmp_path / 'out.unfinished'}" in err
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(model_folder, "write_json", write)
    (source / "preprocessor_config.json").write_text('{"size": 1}')
    for module, compared in ((pipeline, "measure_sensitivity"), (candidates, "fitted_errors")):
        monkeypatch.setattr(module, compared, lambda *_: pytest.fail("a structure is compared again"))
    code, _, err = run(*arguments)
    assert (code, err) == (0, "")
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"size": 1}'
    assert not (tmp_path / "out.unfinished").exists()


@pytest.mark.parametrize("source", ["gpt2"], indirect=True)
def test_distillation_resumes(source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from einlinear import checkpoint, compression

    distill = compression.distill

    def often(*args: Any, **kwargs: Any) -> compression.Distillation:
        return distill(*args, **kwargs, checkpoint_every=0)

    steps: list[int] = []
    save = checkpoint.save

    def interrupted(folder: Path, state: checkpoint.Checkpoint) -> Path:
        steps.append(state.step)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return save(folder, state)

    monkeypatch.setattr(compression, "distill", often)
    monkeypatch.setattr(checkpoint, "save", interrupted)
    command = ("compress", source, "--out", tmp_path / "out", "--budget", 0.6, *OPTIONS, "--calibration", text)
    code, _, err = run(*command, "--distill", 0.02)
    assert code == 130
    assert "The same command resumes" in err
    assert not (tmp_path / "out").exists()
    code, out, err = run(*command, "--distill", 0.02)
    assert (code, err) == (0, "")
    assert steps[:4] == [1, 2, 3, 3]
    assert f"Distilled in {steps[-1]:,} steps" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "text.txt"]


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on memory needs Linux")
@pytest.mark.parametrize("source", ["gpt2"], indirect=True)
def test_a_limit_on_memory_changes_no_result(source: Path, text: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    command = ("compress", source, "--budget", 0.6, *LOW_RANK, "--calibration", text)
    code, out, err = run(*command, "--out", tmp_path / "a")
    assert (code, err) == (0, "")
    assert "Peak memory" not in out
    code, out, err = run(*command, "--out", tmp_path / "b", "--max-memory", "1 MB")
    assert (code, err) == (0, "")
    assert re.search(r"^Peak memory: \d\.\d\d GB, of the 0\.00 GB allowed\.$", out, re.MULTILINE)
    assert "Memory outside of files takes more than that" in out
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("source", ["gpt2"], indirect=True)
def test_a_full_disk_loses_nothing(source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from einlinear import checkpoint
    from einlinear.compression import candidates, pipeline

    write, written = checkpoint.save_file, list[object]()

    def until_full(tensors: object, path: object, **options: Any) -> None:
        written.append(path)
        if len(written) == 3:
            raise checkpoint.SafetensorError("Error while serializing: I/O error: No space left on device")
        write(tensors, path, **options)

    monkeypatch.setattr(checkpoint, "save_file", until_full)
    command = ("compress", source, "--budget", 0.6, *LOW_RANK, "--calibration", text)
    answer = run(*command, "--out", tmp_path / "out")
    assert_refused(
        answer, "cannot be written, the results before it are complete, and the same call resumes: ", "No space"
    )
    assert not (tmp_path / "out").exists()
    for module, compared in ((pipeline, "measure_sensitivity"), (candidates, "fitted_errors")):
        monkeypatch.setattr(module, compared, lambda *_: pytest.fail("a structure is compared again"))
    code, _, err = run(*command, "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    # of the layers that were written before, none is fitted again
    assert len({*written[:3]} & {*written[3:]}) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "text.txt"]


@pytest.mark.parametrize("source", ["bert"], indirect=True)
@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"--count": "flops"}, ["count must be one of 'params', 'macs', 'bytes', 'time', not 'flops'"]),
        ({"--train": "structured"}, ["--train without --distill: give its minutes, as in --distill 10"]),
        ({"--adapter-rank": 16, "--lr": 0.1, "--distill": 0}, ["--lr, --adapter-rank without --distill"]),
        ({"--optimizer": "muon", "--match": "none"}, ["--optimizer, --match without --distill"]),
        ({"--distill": 1, "--train": "some"}, ["--train must be one of all, structured, adapters, not 'some'"]),
        ({"--count": "time"}, ["count='time' needs tokens: the number in one call"]),
        ({"--budget": 0.001}, ["0.001 of the", "params of", "cannot be reached with low_rank, btt"]),
        ({"--structures": "lowrank"}, ["unknown family 'lowrank'. Did you mean 'low_rank'"]),
        ({"--distill": 1}, ["--distill needs text to train on"]),
        ({"--device": "tpu9"}, ["device 'tpu9' cannot be used"]),
        ({"--max-memory": "much"}, ["--max-memory must be a number of MB or GB, such as 2GB, not 'much'"]),
        ({"--max-memory": "0 GB"}, ["--max-memory must be a number of MB or GB, such as 2GB, not '0 GB'"]),
        ({"--max-memory": "2GB", "--device": "cuda"}, ["--max-memory goes without", "memory of the CPU"]),
        (
            {"--max-memory": "2GB", "--distill": 1, "--calibration": "text.txt"},
            ["--max-memory goes without --distill", "training needs all of a model in memory"],
        ),
        (
            {"--max-memory": "2GB", "--dtype": "bfloat16"},
            ["--max-memory needs weights that stay in their files, but ", "does not: give --dtype auto"],
        ),
        ({"--distill": 1, "--calibration": "text.txt", "--dtype": "float16"}, ["float16 parameters cannot be trained"]),
        ({"--distill": 1, "--calibration": "text.txt", "--lr": 0}, ["--lr must be a positive number, not 0"]),
        ({"--optimizer": "sgd"}, ["--optimizer must be one of muon, adamw, not 'sgd'"]),
        ({"--out": "model/small"}, ["is inside the model's own folder", "name a folder beside it"]),
        ({"--out": "model"}, ["exists: name a folder that does not"]),
        ({"--out": "text.txt/out"}, ["--out", "out cannot be a folder: ", "text.txt is a file"]),
        (
            {"--dtype": "half"},
            ["--dtype must be one of auto, float64, float32, ", ", bf16, fp16, not 'half'"],
        ),
        ({"--calibration": "empty.txt"}, ["empty.txt holds no text"]),
        ({"--calibration": "none.txt"}, ["there is no file", "none.txt"]),
        ({"MODEL": "mute", "--calibration": "text.txt"}, ["the model comes without a tokenizer"]),
        ({"--layers": "nothing.*"}, ["layers: 'nothing.*' matches no linear layer"]),
        ({"--embeddings": "nothing.*"}, ["embeddings: 'nothing.*' matches no embedding"]),
        # before the model is looked for
        (
            {"MODEL": "mistyped", "--count": "macs", "--embeddings": "*"},
            ["embeddings are compressed with count='params'"],
        ),
        ({"MODEL": "text.txt"}, ["text.txt is not a model that transformers can load"]),
        ({"MODEL": "mistyped"}, ["there is no folder", "mistyped; names on the hub look like owner/name\n"]),
        ({"MODEL": "adapter"}, ["adapter holds an adapter (adapter_config.json). Merge it into its model first"]),
        ({"MODEL": "empty"}, ["empty is not a model that transformers can load"]),
    ],
)
def test_mistakes(source: Path, text: Path, tmp_path: Path, change: dict[str, Any], parts: list[str]) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "empty").mkdir()
    shutil.copytree(source, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    options: dict[str, Any] = {"--out": "out", "--budget": 0.5} | change
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


@pytest.mark.parametrize("name", ["./nope", "~/nope", "a/b/nope", "nope", "owner/nope", "no pe"])
def test_models_that_do_not_exist(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    answer = run("compress", name, "--out", "out", "--budget", 0.5)
    assert_refused(answer, f"there is no folder {name}", "; names on the hub look like owner/name\n")
    assert answer[2].count("\n") == 1
    assert ("could be fetched from the hub" in answer[2]) == (name in ("nope", "owner/nope", "no pe"))


@ONE
@pytest.mark.parametrize(
    ("match", "message"),
    [
        ("nope", "match: 'nope' matches no module of both models"),
        ("bert.encoder.layer.0, encoder", "match: 'encoder' matches no module of both models"),
        ("bert.encoder.layer", "match: bert.encoder.layer is never called or returns no tensor"),
    ],
)
def test_what_distillation_refuses_is_refused_first(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, match: str, message: str
) -> None:
    from einlinear import compression

    monkeypatch.setattr(compression, "compress", lambda *_, **__: pytest.fail("the model is compressed first"))
    command = ("compress", source, "--out", tmp_path / "out", "--budget", 0.6, *OPTIONS, "--calibration", text)
    assert_refused(run(*command, "--distill", 1, "--match", match), message)


@ONE
def test_short_names_of_dtypes(source: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    command = ("compress", source, "--out", tmp_path / "out", "--budget", 0.6, *OPTIONS[:2], "--dtype", "bf16")
    code, _, err = run(*command)
    assert (code, err) == (0, "")
    assert AutoModel.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_models_that_take_pairs_of_texts(text: Path, tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 48, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    tokenizer_of(text.read_text()).save_pretrained(tmp_path / "t5")
    command = ("compress", tmp_path / "t5", "--budget", 0.6, *OPTIONS[:2], "--out")
    answer = run(*command, tmp_path / "out", "--calibration", text)
    assert_refused(answer, "T5ForConditionalGeneration takes pairs of texts", "call el.compress in Python")
    code, _, err = run(*command, tmp_path / "out")
    assert (code, err) == (0, "")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda module: None if module == "scipy" else module)
    result = CliRunner().invoke(app, ["compress", "model", "--out", "out", "--budget", "0.5"])
    assert "not installed (scipy). Install them with:  pip install 'einlinear[pretrained]'" in str(result.exception)
