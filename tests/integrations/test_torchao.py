"""torchao.quantize_ on structured layers: precision, files, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integrations.transformers.models import make, output
from torch import nn
from torchao import quantize_
from torchao.quantization import (
    Float8WeightOnlyConfig,
    FqnToConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    PerTensor,
)
from torchao.quantization.quant_primitives import MappingType
from transformers import BertForMaskedLM

import einlinear as el
from einlinear.integrations.torchao import is_linear, is_structured
from einlinear.nn import QuantizedLinear
from einlinear.ops.integer_format import IntegerFormat

CONFIGS = {
    "int8": Int8WeightOnlyConfig(),
    "int8(group=32)": Int8WeightOnlyConfig(granularity=PerGroup(32)),
    "int4(group=128)": Int4WeightOnlyConfig(),
    "int4(group=32)": Int4WeightOnlyConfig(group_size=32),
    "int3(group=16)": IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=PerGroup(16)),
    "int5": IntxWeightOnlyConfig(weight_dtype=torch.int5),
}


def model() -> nn.Sequential:
    low_rank, btt = el.Linear(64, 96, "low_rank(rank=32)"), el.Linear(96, 64, "btt(rank=4)", bias=False, normalize=True)
    nn.init.normal_(low_rank.bias)
    nn.init.uniform_(btt.gamma_A)
    return nn.Sequential(low_rank, nn.GELU(), btt, nn.Linear(64, 8)).eval()


@pytest.mark.parametrize("precision", CONFIGS)
def test_factors_are_rounded_to_nearest(precision: str) -> None:
    plain, rounded = model(), model()
    rounded.load_state_dict(plain.state_dict())
    rounded[0].bias.requires_grad_(False)
    quantize_(rounded, CONFIGS[precision], filter_fn=is_structured)
    assert type(rounded[3]) is nn.Linear
    assert torch.equal(rounded[3].weight, plain[3].weight)
    for old, new in ((plain[0], rounded[0]), (plain[2], rounded[2])):
        assert isinstance(new, QuantizedLinear)
        assert (new.precision, new.structure, new.training) == (precision, old.structure, False)
        assert new.nbytes < 2 * old.structure.params
        largest = IntegerFormat.parse(precision).largest
        for exact, found in zip(old.factors(), new.factors(), strict=True):
            # half a step of the coarsest scale, and the rounding of scales to bfloat16
            assert (found - exact).abs().max() <= exact.abs().max() * (0.5 / largest + 2**-8)
            assert not torch.equal(found, exact)
        x = torch.randn(3, new.in_features)
        expected = x @ new.dense_weight().T + (0 if old.bias is None else old.bias)
        torch.testing.assert_close(new(x), expected)
    assert not rounded[0].bias.requires_grad


def test_dense_layers_are_left_to_torchao() -> None:
    mixed = model()
    dense = copy.deepcopy(mixed[3:])
    quantize_(mixed, Int8WeightOnlyConfig(), filter_fn=is_linear)
    quantize_(dense, Int8WeightOnlyConfig())
    assert [type(layer) for layer in mixed] == [QuantizedLinear, nn.GELU, QuantizedLinear, nn.Linear]
    assert type(mixed[3].weight) is type(dense[0].weight)
    assert type(mixed[3].weight) is not nn.Parameter
    x = torch.randn(3, 64)
    assert torch.equal(mixed[3](x), dense(x))
    stored = copy.deepcopy(mixed.state_dict())
    # once is enough
    quantize_(mixed[:3], Int8WeightOnlyConfig(), filter_fn=is_linear)
    assert all(torch.equal(stored[name], value) for name, value in mixed[:3].state_dict().items())


def test_the_dtype_is_kept() -> None:
    half = model().bfloat16()
    quantize_(half, Int8WeightOnlyConfig(), filter_fn=is_structured)
    assert half(torch.randn(3, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_layers_by_name() -> None:
    named = model()
    quantize_(named, FqnToConfig({"0": CONFIGS["int4(group=32)"], "re:2": CONFIGS["int8"]}), filter_fn=None)
    assert [named[i].precision for i in (0, 2)] == ["int4(group=32)", "int8"]
    with pytest.raises(ValueError, match=r"is quantised already: QuantizedLinear\(in_features=64"):
        quantize_(named, FqnToConfig({"0": CONFIGS["int8"]}), filter_fn=None)
    for parameter in ("0.A", r"re:0\..*"):
        with pytest.raises(ValueError, match=r"quantised together: name the layer, without \.A, in FqnToConfig"):
            quantize_(model(), FqnToConfig({parameter: CONFIGS["int8"]}), filter_fn=None)


@pytest.mark.parametrize(
    "config",
    [
        Int8DynamicActivationInt8WeightConfig(),
        Float8WeightOnlyConfig(),
        Int8WeightOnlyConfig(granularity=PerTensor()),
        Int4WeightOnlyConfig(int4_choose_qparams_algorithm="hqq"),
        IntxWeightOnlyConfig(mapping_type=MappingType.ASYMMETRIC),
        IntxWeightOnlyConfig(intx_choose_qparams_algorithm="hqq_scale_only"),
        IntxWeightOnlyConfig(weight_dtype=torch.int1),
    ],
    ids=lambda config: type(config).__name__,
)
def test_configs_without_a_counterpart(config: Any) -> None:
    refused = model()
    with pytest.raises(
        ValueError, match=rf"cannot be quantised by {type(config).__name__}\(.*take Int8WeightOnlyConfig"
    ):
        quantize_(refused, config, filter_fn=is_linear)
    assert type(refused[0]) is el.Linear


def test_layers_that_cannot_be_replaced() -> None:
    with pytest.raises(ValueError, match=r"itself a structured layer.*nn\.Sequential\(layer\)"):
        quantize_(model()[0], Int8WeightOnlyConfig(), filter_fn=is_linear)
    with pytest.raises(ValueError, match="on the meta device has no values"):
        quantize_(model().to("meta"), Int8WeightOnlyConfig(), filter_fn=is_structured)


def test_files(tmp_path: Path) -> None:
    saved, loaded = model(), model()
    for each in (saved, loaded):
        quantize_(each, CONFIGS["int4(group=32)"], filter_fn=is_structured)
    x = torch.randn(3, 64)
    assert not torch.equal(loaded(x), saved(x))
    torch.save(saved.state_dict(), tmp_path / "weights.pt")
    loaded.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert torch.equal(loaded(x), saved(x))
    torch.save(saved, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(x), saved(x))


def test_folders(tmp_path: Path) -> None:
    bert = make("bert", "low_rank(rank=16)")
    quantize_(bert, CONFIGS["int4(group=32)"], filter_fn=is_structured)
    bert.save_pretrained(tmp_path)
    loaded = BertForMaskedLM.from_pretrained(tmp_path)
    layers = [module for module in loaded.modules() if isinstance(module, el.Linear)]
    assert {type(layer) for layer in layers} == {QuantizedLinear}
    assert {layer.precision for layer in layers} == {"int4(group=32)"}
    assert torch.equal(output(loaded), output(bert))
