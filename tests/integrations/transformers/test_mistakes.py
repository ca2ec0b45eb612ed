"""What does not fit together is refused with its name: no layer is ever left with random weights."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integrations.transformers.models import edit_config, edit_weights, make, output
from torch import nn
from transformers import (
    AutoModelForMaskedLM,
    BertForMaskedLM,
    BertModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)
from transformers.utils.quantization_config import BitsAndBytesConfig, QuantizationConfigMixin

import einlinear as el
from einlinear.integrations.transformers import saving
from einlinear.integrations.transformers.quantizer import EinlinearConfig
from einlinear.structures import FAMILIES

NAME = "bert.encoder.layer.0.intermediate.dense"
ENTRY = {"structure": "btt", "in_features": 32, "out_features": 64, "bias": True}
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make("bert", layers="*dense").save_pretrained(tmp_path)
    return tmp_path


def entry(**change: Any) -> Change:
    return lambda description: description["layers"][NAME].update(change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=2), "is of version 2, but this einlinear reads versions up to 1: update it"),
        (lambda d: d.update(version="1"), "version must be a whole number such as 1, not '1'"),
        (lambda d: d.pop("version"), "version must be a whole number such as 1, not None"),
        (lambda d: d.pop("layers"), "layers must map the names of layers to descriptions, not None"),
        (lambda d: d.update(layers=[NAME]), r"layers must map the names of layers to descriptions, not \['bert"),
        (lambda d: d.update(layer={}), "unknown layer; it has quant_method, version, layers"),
        (lambda d: d["layers"].update({NAME: "btt"}), f"{NAME}: expected a mapping with structure, .*, not 'btt'"),
        (entry(rank=2), f"{NAME} has rank, which is unknown: an entry has structure, in_features, out_features, bias"),
        (lambda d: d["layers"][NAME].pop("bias"), f"{NAME} has no bias: an entry has structure"),
        (entry(bias="yes"), f"{NAME}: bias must be of type bool, not 'yes'"),
        (entry(in_features=32.0), f"{NAME}: in_features must be of type int, not 32.0"),
        (entry(in_features=31), f"{NAME} is described as 31 -> 64 features, but the model has 32 -> 64 there"),
        (entry(structure="btt(rank="), f"{NAME}: .*"),
        (entry(in_features=2**61 - 1), f"{NAME}: in_features must be from 1 to 2147483647, not 2305843009213693951"),
        (entry(out_features=0), f"{NAME}: out_features must be from 1 to"),
        (entry(structure="i, o i -> o" + " " * 10**6), f"{NAME}: structure must have at most 10,000 characters"),
        (entry(structure="btt(cores=3000)"), f"{NAME}: btt: cores must be at most 31, not 3000"),
        (entry(structure="btt(rank=" + "-" * 5000 + "1)"), f"{NAME}: tuples and minus signs are nested more than 20"),
        (entry(structure="btt(rnk=2)"), f"{NAME}: btt has no argument 'rnk'"),
        (
            entry(structure="mine(rank=2)"),
            f"{NAME}: unknown family 'mine'.*Register a family .* with el.register_family before",
        ),
        (lambda d: d["layers"].update({"bert.nowhere": ENTRY}), "bert.nowhere .* but BertForMaskedLM has none there"),
        (
            lambda d: d["layers"].update({"bert.embeddings.LayerNorm": ENTRY}),
            "bert.embeddings.LayerNorm .* is a LayerNorm, not linear",
        ),
        (entry(structure="btt(rank=3)"), rf"{NAME}\.A of shape \(.*\) did not come from the checkpoint"),
        (entry(normalize=True), rf"{NAME}\.gamma_A of shape \(1,\) did not come from the checkpoint"),
    ],
)
def test_a_description_that_is_wrong(folder: Path, change: Change, message: str) -> None:
    edit_config(folder, change)
    with pytest.raises(ValueError, match=message):
        BertForMaskedLM.from_pretrained(folder, ignore_mismatched_sizes=True)


@pytest.mark.parametrize(
    ("change", "shapes"),
    [
        (lambda weights: weights.pop(f"{NAME}.A"), False),
        (lambda weights: weights.pop(f"{NAME}.bias"), False),
        (lambda weights: weights.update({f"{NAME}.B": torch.zeros(3)}), True),
    ],
)
@pytest.mark.parametrize("model", [BertForMaskedLM, BertModel])
def test_a_checkpoint_that_lacks_factors(
    folder: Path, model: type[PreTrainedModel], change: Callable[[dict[str, torch.Tensor]], object], shapes: bool
) -> None:
    edit_weights(folder, change)
    with pytest.raises(ValueError, match=r"encoder.layer.0.intermediate.dense\.\w+ of shape \(.*\) did not come from"):
        model.from_pretrained(folder, ignore_mismatched_sizes=True)
    if shapes:
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            model.from_pretrained(folder)


def test_a_layer_that_the_description_lacks(folder: Path) -> None:
    """The guard stands in the file where the dense weight would be."""
    edit_config(folder, lambda description: description["layers"].pop(NAME))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        BertForMaskedLM.from_pretrained(folder)


def test_experts_that_the_description_lacks_or_that_differ(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(**sizes, vocab_size=48, num_key_value_heads=1, num_local_experts=4, eos_token_id=2)
    model = MixtralForCausalLM(config)
    el.convert(model, {"*.experts": "btt", "*.q_proj": "btt"})
    model.save_pretrained(tmp_path)
    stacks = [f"model.layers.0.mlp.experts.{name}" for name in ("gate", "up", "down")]
    text = (tmp_path / "config.json").read_text(encoding="utf-8")

    def load(change: Callable[[dict[str, Any]], object]) -> None:
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        edit_config(tmp_path, lambda description: change(description["layers"]))
        MixtralForCausalLM.from_pretrained(tmp_path)

    # the guard stands where the dense weights would be
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(lambda layers: [layers.pop(stack) for stack in stacks])
    with pytest.raises(ValueError, match=r"experts: structure has the keys \['down', 'gate'\], but needs"):
        load(lambda layers: layers.pop(stacks[1]))
    with pytest.raises(ValueError, match=r"up is described as 4 experts of 32 -> 65 features, but the model has 4 exp"):
        load(lambda layers: layers[stacks[1]].update(out_features=65))
    with pytest.raises(ValueError, match=r"up is described as 5 experts of 32 -> 64 features"):
        load(lambda layers: layers[stacks[1]].update(experts=5))
    with pytest.raises(ValueError, match=r"experts must be from 1"):
        load(lambda layers: layers[stacks[1]].update(experts=0))
    with pytest.raises(
        ValueError, match=r"mlp\.other is described as a structured layer, but MixtralForCausalLM has none"
    ):
        load(lambda layers: layers.update({stack.replace("experts", "other"): layers.pop(stack) for stack in stacks}))
    with pytest.raises(ValueError, match=r"grouped.*Register a family of your own"):
        load(lambda layers: layers[stacks[1]].update(structure="grouped(rank=3)"))
    load(lambda layers: None)


def test_a_family_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("einlinear.structures.families.FAMILIES", dict(FAMILIES))
    el.register_family("grouped", lambda rank=2: f"(g a), g r a, g e r -> (g e) where g=4, r={rank}")
    model = make("bert", "grouped(rank=3)")
    model.save_pretrained(tmp_path)
    assert torch.equal(output(BertForMaskedLM.from_pretrained(tmp_path)), output(model))


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (lambda: el.MoELinear(32, 64, "btt", experts=2, active=1), "MoELinear"),
        (lambda: type("Own", (el.Linear,), {"forward": lambda self, x: x})(32, 64, "btt"), "Own"),
    ],
)
def test_layers_without_a_description(tmp_path: Path, layer: Callable[[], nn.Module], kind: str) -> None:
    model = make("bert")
    model.bert.encoder.layer[0].intermediate.dense = layer()
    with pytest.raises(ValueError, match=f"{NAME} is a {kind}: only el.Linear, el.Embedding and experts can be saved"):
        model.save_pretrained(tmp_path)
    assert not [*tmp_path.iterdir()]


def test_a_head_that_would_be_tied(tmp_path: Path) -> None:
    model = make("gpt2")
    model.lm_head = el.Linear(32, 48, "btt", bias=False)
    with pytest.raises(ValueError, match=r"lm_head .* would tie its weight to transformer.wte.weight .* = False"):
        model.save_pretrained(tmp_path)
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path)
    assert torch.equal(output(type(model).from_pretrained(tmp_path)), output(model))


def test_an_old_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("bert")
    monkeypatch.setattr(saving.transformers, "__version__", "4.57.1")
    with pytest.raises(ImportError, match=r"saved with transformers 5 or later, not 4\.57\.1"):
        model.save_pretrained(tmp_path)


def test_quantised_by_others(tmp_path: Path, folder: Path) -> None:
    """What others have written into the config is left alone."""
    model = make("bert")
    model.config.quantization_config = {"quant_method": "other"}
    with pytest.raises(ValueError, match="structured layer in a model that is quantised"):
        model.save_pretrained(tmp_path / "both")
    el.densify(model)
    model.save_pretrained(tmp_path / "other")
    assert json.loads((tmp_path / "other" / "config.json").read_text())["quantization_config"] == {
        "quant_method": "other"
    }
    with pytest.raises(ValueError, match="BitsAndBytesConfig"):
        BertForMaskedLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_a_dense_folder_is_not_converted_by_loading_it(tmp_path: Path) -> None:
    make("bert", None).save_pretrained(tmp_path)
    config: QuantizationConfigMixin = EinlinearConfig(version=1, layers={NAME: ENTRY})
    with pytest.raises(ValueError, match=r"Load the dense model without it, then call el\.convert"):
        BertForMaskedLM.from_pretrained(tmp_path, quantization_config=config)


def test_pickles_run_no_code(folder: Path) -> None:
    """transformers reads them with weights_only; a folder of ours has none in the first place."""

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (folder.joinpath("evil").touch, ())

    assert not [*folder.glob("*.bin")]
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({f"{NAME}.A": Evil()}, file, protocol=2)
    with pytest.raises(pickle.UnpicklingError):
        AutoModelForMaskedLM.from_pretrained(folder)
    assert not (folder / "evil").exists()
