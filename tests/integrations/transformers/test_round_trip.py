"""A model that was saved and loaded is the same model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.families import PATTERNS, SAMPLES
from tests.integrations.transformers.models import MODELS, inputs, make, output, structured
from tests.lab.data.samples import needs
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    MixtralModel,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import einlinear as el
from einlinear.integrations.transformers import register
from einlinear.nn import GatedExperts

AUTO: dict[str, Any] = {"bert": AutoModelForMaskedLM, "vit": AutoModelForImageClassification}
SPECS = [spec for specs in SAMPLES.values() for spec in specs] + PATTERNS[:3]


def reload(model: PreTrainedModel, folder: Path, auto: Any = None, **options: Any) -> Any:
    """Save and load; nothing is missing, left over or of another shape."""
    model.save_pretrained(folder)
    loaded, info = (auto or type(model)).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return loaded


@pytest.mark.parametrize("structure", ["btt(rank=2)", "low_rank(rank=3)"])
@pytest.mark.parametrize("name", MODELS)
def test_every_model(name: str, structure: str, tmp_path: Path) -> None:
    model = make(name, structure)
    assert len(structured(model)) >= 8
    loaded = reload(model, tmp_path, AUTO.get(name, AutoModelForCausalLM))
    assert type(loaded) is type(model)
    assert structured(loaded) == structured(model)
    assert torch.equal(output(loaded), output(model))
    weights = load_file(tmp_path / "model.safetensors")
    assert sum(w.numel() for w in weights.values()) == model.num_parameters()  # the guards are empty


@pytest.mark.parametrize("structure", SPECS)
def test_every_family(structure: str, tmp_path: Path) -> None:
    """With and without what only some layers have: a bias, normalised factors, gammas."""
    model = make("gpt2", None)
    first, second = model.transformer.h
    first.mlp.c_proj = el.Linear(128, 32, structure, normalize=True)
    second.mlp.c_proj = el.Linear(128, 32, structure, bias=False)  # GPT-2 initialises its weight from outside
    second.mlp.c_fc = el.Linear(32, 128, structure, normalize=True, gamma=False)
    with torch.no_grad():
        for layer in (first.mlp.c_proj, second.mlp.c_proj, second.mlp.c_fc):
            for parameter in layer.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    loaded = reload(model, tmp_path)
    assert torch.equal(output(loaded), output(model))
    for name, saved in model.named_modules():
        if isinstance(saved, el.Linear):
            new = loaded.get_submodule(name)
            assert (new.structure, new.normalize, new.has_gamma) == (saved.structure, saved.normalize, saved.has_gamma)
            assert [*new.state_dict()] == [*saved.state_dict()]


def test_the_description(tmp_path: Path) -> None:
    make("llama", layers="*.0.mlp.down_proj").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == {
        "quant_method": "einlinear",
        "version": 1,
        "layers": {
            "model.layers.0.mlp.down_proj": {
                "structure": "btt(rank=2)",
                "in_features": 64,
                "out_features": 32,
                "bias": False,
            }
        },
    }
    guard = load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert guard.shape == (0,)


def test_layers_are_found_however_they_came_into_the_model(tmp_path: Path) -> None:
    """A part of the model was converted, a layer was put in by hand, another was made dense again."""
    model = make("bert", None)
    el.convert(model.bert.encoder, "btt")
    model.cls.predictions.transform.dense = el.Linear(32, 32, "dyad")
    layer = model.bert.encoder.layer[1].output
    layer.dense = layer.dense.to_dense()
    loaded = reload(model, tmp_path)
    assert len(structured(loaded)) == 12
    assert structured(loaded) == structured(model)
    assert torch.equal(output(loaded), output(model))


def test_a_loaded_model_is_an_ordinary_one(tmp_path: Path) -> None:
    model = make("gpt2")
    loaded = reload(model, tmp_path)
    for one in (model, loaded):
        assert not getattr(one, "is_quantized", False)
        assert getattr(one, "hf_quantizer", None) is None
        assert not {"quantization_config", "auto_map"} & one.config.to_dict().keys()
    assert torch.equal(output(copy.deepcopy(loaded)), output(model))
    assert loaded.half().dtype == torch.float16
    assert torch.equal(output(loaded.float()), output(copy.deepcopy(model).half().float()))


def test_saved_again(tmp_path: Path) -> None:
    """After a change, the description is that of the changed model; nothing of it stays with one that is dense."""
    model = reload(make("bert"), tmp_path)
    el.densify(model.bert.encoder.layer[0])
    again = reload(model, tmp_path)
    assert structured(again) == structured(model)
    assert torch.equal(output(again), output(model))
    el.densify(again)
    dense = reload(again, tmp_path / "dense")
    assert not structured(dense)
    assert torch.equal(output(dense), output(again))
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not {"quantization_config", "auto_map"} & config.keys()
    assert not (tmp_path / "dense" / "configuration_einlinear.py").exists()


@pytest.mark.parametrize("name", MODELS)
def test_densified(name: str, tmp_path: Path) -> None:
    """Also where the weights of dense layers are transposed, which those of square ones would not show."""
    model = reload(make(name), tmp_path / "structured")
    el.densify(model)
    torch.testing.assert_close(output(model), output(make(name)))
    assert torch.equal(output(reload(model, tmp_path / "dense")), output(model))


def test_a_model_made_from_the_config_alone_is_dense(tmp_path: Path) -> None:
    make("bert").save_pretrained(tmp_path)
    dense = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(tmp_path)).eval()
    assert not structured(dense)
    assert torch.equal(output(reload(dense, tmp_path / "dense")), output(dense))


def test_with_and_without_a_head(tmp_path: Path) -> None:
    """Names have a prefix in a model with a head: bert.encoder, and encoder without one."""
    model = make("bert")
    head = "cls.predictions.transform.dense"
    assert head in structured(model)
    model.save_pretrained(tmp_path / "head")
    body = AutoModel.from_pretrained(tmp_path / "head")
    assert isinstance(body, BertModel)
    assert len(structured(body)) == 12
    assert torch.equal(output(body), output(model.bert))
    body.save_pretrained(tmp_path / "body")
    again, info = BertForMaskedLM.from_pretrained(tmp_path / "body", output_loading_info=True)
    assert len(structured(again)) == 12
    assert torch.equal(output(again.bert), output(body))
    assert not [key for key in info["unexpected_keys"] if not key.startswith("pooler.")]
    assert all(key.startswith("cls.") for key in info["missing_keys"])


def test_another_head(tmp_path: Path) -> None:
    """Fine-tuning: the layers come from the folder, the new head is drawn by transformers."""
    body = make("bert").bert
    body.save_pretrained(tmp_path)
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert isinstance(model, BertForSequenceClassification)
    assert {"classifier.weight", "classifier.bias"} < {*info["missing_keys"]}
    assert 0.01 < float(model.classifier.weight.detach().std()) < 0.03  # config.initializer_range is 0.02
    assert torch.equal(output(model.bert), output(body))
    model.save_pretrained(tmp_path / "3")
    options: dict[str, Any] = {"num_labels": 5, "ignore_mismatched_sizes": True}
    other = BertForSequenceClassification.from_pretrained(tmp_path / "3", **options)
    assert other.classifier.weight.shape == (5, 32)
    assert torch.equal(output(other.bert), output(body))


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert"])
def test_tied_heads_stay_tied(name: str, tmp_path: Path) -> None:
    loaded = reload(make(name), tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


class Twins(PreTrainedModel):
    """Two layers that transformers is told to tie, as the heads of some detectors."""

    config_class = BertConfig
    main_input_name = "x"
    _tied_weights_keys = {"second": "first"}  # noqa: RUF012

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.post_init()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(self.first(x))
        return y


def test_layers_that_are_tied_stay_tied(tmp_path: Path) -> None:
    model = Twins(BertConfig()).eval()
    assert model.second.weight is model.first.weight
    el.convert(model, "btt")
    loaded = reload(model, tmp_path)
    assert loaded.second.A is loaded.first.A
    x = torch.randn(3, 32)
    assert torch.equal(loaded(x), model(x))


def test_dtypes(tmp_path: Path) -> None:
    model = make("gpt2")
    loaded = reload(model, tmp_path / "fp32", dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    model.bfloat16()
    assert torch.equal(output(loaded), output(model))
    for dtype in ("auto", None):
        loaded = reload(model, tmp_path / "bf16", dtype=dtype)
        assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in reload(model, tmp_path / "bf16", dtype=torch.float32).parameters()} == {torch.float32}


def test_modules_that_stay_in_float32(tmp_path: Path) -> None:
    """transformers keeps T5's wo in float32 where all else is float16."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=48, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, tie_word_embeddings=True)
    model = T5ForConditionalGeneration(config).eval()
    el.convert(model, "btt")
    loaded = reload(model, tmp_path, dtype=torch.float16)
    assert loaded.encoder.block[0].layer[1].DenseReluDense.wo.A.dtype == torch.float32
    assert loaded.encoder.block[0].layer[1].DenseReluDense.wi.A.dtype == torch.float16
    ids = torch.arange(3, 9)[None]
    expected = model(input_ids=ids, decoder_input_ids=ids).logits
    loaded = reload(model, tmp_path)
    assert torch.equal(loaded(input_ids=ids, decoder_input_ids=ids).logits, expected)


@needs("accelerate")
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(device_map: Any, tmp_path: Path) -> None:
    model = make("llama")
    assert torch.equal(output(reload(model, tmp_path, device_map=device_map)), output(model))


@needs("accelerate")
def test_layers_on_disk(tmp_path: Path) -> None:
    model = make("llama")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    loaded = reload(model, tmp_path / "saved", device_map=places, offload_folder=tmp_path / "offloaded")
    assert loaded.model.layers[1].mlp.up_proj.A.is_meta
    assert torch.equal(output(loaded), output(model))


def test_shards(tmp_path: Path) -> None:
    model = make("bert")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(output(BertForMaskedLM.from_pretrained(tmp_path)), output(model))


def test_a_state_dict_that_is_given_is_saved(tmp_path: Path) -> None:
    """As Trainer does, which gathers it from all processes."""
    model = make("bert")
    weights = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=weights)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert torch.equal(output(BertForMaskedLM.from_pretrained(tmp_path)), output(model))


def test_the_state_dict_of_a_file_fits_strictly(tmp_path: Path) -> None:
    model, other = make("gpt2"), make("gpt2")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        other.transformer.h[0].attn.c_attn.A.zero_()
    weights = load_file(tmp_path / "model.safetensors")
    assert other.load_state_dict(weights | {"lm_head.weight": weights["transformer.wte.weight"]}).unexpected_keys == []
    assert torch.equal(output(other), output(model))
    weights["transformer.h.0.attn.c_attn.weight"] = torch.ones(3)  # no guard
    assert other.load_state_dict(weights, strict=False).unexpected_keys == ["transformer.h.0.attn.c_attn.weight"]


_MIXTURE = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
_MIXTURE |= {"num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": 2}
_EXPERTS = {"moe_intermediate_size": 48, "num_experts": 6, "num_experts_per_tok": 3, "head_dim": 16}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "make_mixture",
    [
        lambda: MixtralForCausalLM(MixtralConfig(**_MIXTURE, num_local_experts=4)),
        lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**_MIXTURE, **_EXPERTS)),
    ],
)
def test_experts(make_mixture: Callable[[], PreTrainedModel], normalize: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make_mixture().eval()
    name = "model.layers.1.mlp.experts"
    # one block of dense experts, whose weights transformers splits in the file
    el.convert(model, {"*.0.mlp.experts": "btt", "*_proj": "low_rank(rank=4)"}, normalize=normalize)
    stacks = {"gate": "low_rank(rank=4)", "up": "low_rank(rank=8)", "down": "btt"}
    model.model.layers[1].mlp.experts = GatedExperts.like(model.get_submodule(name), stacks, normalize=normalize)
    loaded = reload(model, tmp_path)
    assert structured(loaded) == structured(model)
    experts = loaded.get_submodule(name)
    assert isinstance(experts, GatedExperts)
    assert {key: stack.structure.spec for key, stack in experts.stacks().items()} == stacks
    assert torch.equal(output(loaded), output(model))
    # and on
    assert torch.equal(output(reload(loaded, tmp_path / "again")), output(model))
    el.densify(loaded)
    torch.testing.assert_close(output(reload(loaded, tmp_path / "dense")), output(model))


def test_experts_in_half_precision_and_a_model_without_a_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**_MIXTURE, num_local_experts=4)).bfloat16().eval()
    el.convert(model, {"*.experts": "btt"})
    model.save_pretrained(tmp_path)
    loaded = MixtralForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    # frequencies of positions are rounded in one of them
    assert torch.equal(output(loaded.bfloat16()), output(model))
    body = MixtralModel.from_pretrained(tmp_path).bfloat16()
    assert isinstance(body.layers[0].mlp.experts, GatedExperts)
    ids = torch.arange(3, 10)[None]
    assert torch.equal(body(ids).last_hidden_state, loaded.model(ids).last_hidden_state)


def test_names_that_differ_in_the_file(tmp_path: Path) -> None:
    """transformers renames the parts of some models when it saves them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 8, "patch_size": 4, "model_type": "clip_vision_model"}
    text = make("llama", None).config.to_dict()
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=47)
    model = LlavaForConditionalGeneration(config).eval()
    el.convert(model, "btt", layers=["*self_attn*", "*mlp*", "*linear_1"])
    loaded = reload(model, tmp_path)
    assert "language_model.model.layers.0.mlp.up_proj.A" in load_file(tmp_path / "model.safetensors")
    assert structured(loaded) == structured(model)
    ids, pixels = torch.tensor([[1, 5, *[47] * 4, 7]]), torch.randn(1, 3, 8, 8)
    assert torch.equal(loaded(ids, pixel_values=pixels).logits, model(ids, pixel_values=pixels).logits)


def test_generation(tmp_path: Path) -> None:
    for name in ("llama", "gpt2"):
        loaded = reload(make(name), tmp_path / name)
        ids = inputs(loaded)["input_ids"]
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        cached = loaded.generate(ids, attention_mask=torch.ones_like(ids), use_cache=True, **options)
        plain = loaded.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
        assert cached.shape == (2, 15)
        assert torch.equal(cached, plain)


def test_compile(tmp_path: Path) -> None:
    loaded = reload(make("llama"), tmp_path)
    expected = output(loaded)
    compiled = torch.compile(loaded, backend="aot_eager")
    torch.testing.assert_close(output(compiled), expected)
    compiled.save_pretrained(tmp_path / "compiled")
    assert torch.equal(output(type(loaded).from_pretrained(tmp_path / "compiled")), expected)


def test_registering_twice_is_registering_once() -> None:
    before = PreTrainedModel.save_pretrained, AUTO_QUANTIZER_MAPPING["einlinear"]
    register()
    assert (PreTrainedModel.save_pretrained, AUTO_QUANTIZER_MAPPING["einlinear"]) == before
