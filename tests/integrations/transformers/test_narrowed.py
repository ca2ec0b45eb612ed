"""Models with fewer heads and narrower feed-forward blocks: saved and loaded, with this library and without."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.integrations.transformers.models import edit_config, inputs, make, output
from tests.lab.data.samples import needs
from torch import nn
from transformers import BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import einlinear as el
from einlinear.compression.narrowed_config import config_changes, find_blocks
from einlinear.compression.selection import select_layers

# in a process that cannot import this library
_PLAIN = """
import sys
sys.modules["einlinear"] = None
import torch, transformers
from safetensors.torch import save_file
loaded = transformers.{cls}.from_pretrained({folder!r}).eval()
save_file({{"logits": loaded(torch.load({folder!r} + "/ids.pt"))[0].detach()}}, {folder!r} + "/logits")
"""


def narrow(model: PreTrainedModel, *structures: str, budget: float = 0.6, count: str = "params") -> PreTrainedModel:
    batches = [{"input_ids": torch.randint(3, 48, (16, 12), generator=torch.Generator().manual_seed(2))}]
    report = el.compress(model, budget, structures, batches, count=count)
    assert any(layer.structure.startswith("narrow") for layer in report.layers)
    return model


def grouped_query() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 48}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4)).eval()


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("structures", [["narrow"], ["narrow", "low_rank"]])
def test_blocks_of_different_sizes(name: str, structures: list[str], tmp_path: Path) -> None:
    model = narrow(make(name, None), *structures, budget=0.5)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(output(loaded.eval()), output(model))
    # twice
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(output(type(model).from_pretrained(tmp_path / "again").eval()), output(model))
    assert torch.equal(output(copy.deepcopy(loaded)), output(model))


def test_a_body_of_another_class(tmp_path: Path) -> None:
    model = narrow(make("bert", None), "narrow")
    model.save_pretrained(tmp_path)
    body = BertModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    with torch.no_grad():
        assert torch.equal(body(**inputs(model))[0], model.bert(**inputs(model))[0])


def test_in_few_bytes(tmp_path: Path) -> None:
    model = narrow(make("bert", None), "narrow", budget=0.06, count="bytes")
    model.save_pretrained(tmp_path)
    assert torch.equal(output(type(model).from_pretrained(tmp_path).eval()), output(model))


def test_uniform_sizes_load_without_this_library(tmp_path: Path) -> None:
    models = {"BertForMaskedLM": make("bert", None), "GPT2LMHeadModel": make("gpt2", None)}
    models["LlamaForCausalLM"] = grouped_query()
    for cls, model in models.items():
        # less than the attention of Llama holds, so that heads are removed as well
        narrow(model, "narrow(uniform=True)", budget=0.3 if "Llama" in cls else 0.6)
        model.save_pretrained(tmp_path / cls)
        saved = json.loads((tmp_path / cls / "config.json").read_text())
        assert "quantization_config" not in saved
        assert not any(isinstance(module, el.Linear) for module in model.modules())
        torch.save(inputs(model)["input_ids"], tmp_path / cls / "ids.pt")
    assert models["BertForMaskedLM"].config.intermediate_size < 64
    assert models["BertForMaskedLM"].config.num_attention_heads == 2
    assert models["GPT2LMHeadModel"].config.n_inner < 128
    config = models["LlamaForCausalLM"].config
    assert config.num_attention_heads == 2 * config.num_key_value_heads < 8
    assert config.head_dim == 4
    code = "".join(_PLAIN.format(cls=cls, folder=str(tmp_path / cls)) for cls in models)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for cls, model in models.items():
        assert torch.equal(load_file(tmp_path / cls / "logits")["logits"], output(model))


def test_the_config_keeps_the_size_of_blocks_that_are_removed_as_a_whole() -> None:
    """A config with size 0 builds a model that transformers may not be able to initialise, such as a T5."""
    model, batches = make("bert", None), [{"input_ids": torch.randint(3, 48, (16, 12))}]
    with torch.no_grad():
        blocks, _ = find_blocks(model, select_layers(model, None, batches), batches, ["narrow"])
    inner = [block for block in blocks if block.size == 64]
    assert len(inner) == 2
    assert config_changes(model, [(block, range(5)) for block in inner]) == {"intermediate_size": 5}
    assert config_changes(model, [(block, range(0)) for block in inner]) is None


def test_a_narrow_model_generates() -> None:
    model = narrow(grouped_query(), "narrow", budget=0.5)
    ids = torch.randint(3, 48, (1, 4))
    # with a cache and without
    texts = [model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*texts)


@needs("onnxruntime")
@needs("onnxscript")
@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_onnx(tmp_path: Path) -> None:
    import onnxruntime

    model = narrow(make("bert", None), "narrow", "low_rank", budget=0.5)
    given, path = inputs(model), tmp_path / "model.onnx"
    names = {"input_names": list(given), "output_names": ["logits"]}
    torch.onnx.export(model, kwargs=given, f=path, dynamo=True, verbose=False, **names)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {name: value.numpy() for name, value in given.items()})
    torch.testing.assert_close(torch.from_numpy(logits), output(model), atol=1e-4, rtol=1e-4)


def test_descriptions_that_are_wrong_raise(tmp_path: Path) -> None:
    model = narrow(make("bert", None), "narrow", budget=0.5)
    model.save_pretrained(tmp_path)
    attributes = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["attributes"]
    place = next(iter(attributes))
    for wrong, message in (
        ([1], "attributes must map modules to numbers by name"),
        ({place: {"num_attention_heads": "x"}}, "num_attention_heads must be a whole number from 0"),
        ({place: {"forward": 1}}, "has no number called forward"),
    ):
        edit_config(tmp_path, lambda described, wrong=wrong: described.update(attributes=wrong))
        with pytest.raises(ValueError, match=message):
            type(model).from_pretrained(tmp_path)
    assert isinstance(model.bert.encoder.layer[0].output.dense, nn.Linear)
