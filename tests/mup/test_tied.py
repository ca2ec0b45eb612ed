"""A head tied to an embedding: one rule in either order, and steps of one size at every width."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import einlinear as el

VOCABULARY = 100
_IDS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}


class Tied(nn.Module):
    """Residual blocks between an embedding and the head that shares its weight, one of which is registered first."""

    def __init__(self, width: int, structure: str, head_first: bool) -> None:
        super().__init__()
        if head_first:
            self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                el.Linear(width, 4 * width, structure),
                nn.GELU(),
                el.Linear(4 * width, width, structure),
            )
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        if not head_first:
            self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        for block in self.blocks:
            h = h + block(h)
        logits: Tensor = self.head(self.norm(h))
        return logits


def llama(width: int, structure: str) -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **_IDS, tie_word_embeddings=True))
    if structure != "dense":
        el.convert(model, structure, layers="*.layers.*")
    return model


def gpt2(width: int, structure: str) -> nn.Module:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(n_positions=32, n_embd=width, n_layer=1, n_head=4, **dropout, **_IDS))
    if structure != "dense":
        el.convert(model, structure, layers="*.h.*")
    return model


BUILD: dict[str, Callable[[int, str], nn.Module]] = {
    "embedding first": lambda width, structure: Tied(width, structure, head_first=False),
    "head first": lambda width, structure: Tied(width, structure, head_first=True),
    "llama": llama,
    "gpt2": gpt2,
}


def change(model: nn.Module, groups: list[dict[str, Any]], optimizer: str) -> float:
    """The root mean square of the change of the logits in three steps."""

    def logits() -> Tensor:
        found = model(ids)
        return found if isinstance(found, Tensor) else found.logits

    stepper = torch.optim.Adam(groups) if optimizer == "adam" else torch.optim.SGD(groups)
    ids = torch.randint(VOCABULARY, (32, 8), generator=torch.Generator().manual_seed(1))
    labels = (7 * ids + 3) % VOCABULARY
    before = logits().detach()
    for _ in range(3):
        stepper.zero_grad()
        F.cross_entropy(logits().flatten(0, 1), labels.flatten()).backward()
        stepper.step()
    return float((logits().detach() - before).square().mean().sqrt())


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize(("optimizer", "lr", "factor"), [("adam", 1e-2, 2), ("sgd", 0.1, 3)])
def test_steps_have_one_size_at_every_width(name: str, optimizer: str, lr: float, factor: float) -> None:
    with torch.device("meta"):
        base = BUILD[name](64, "dense")
    changes = []
    for width in (64, 256, 1024):
        torch.manual_seed(0)
        model = el.init_(BUILD[name](width, "btt(rank=2)"), base=base)
        changes.append(change(model, el.param_groups(model, lr, base=base, optimizer=optimizer), optimizer))
    assert max(changes) < factor * min(changes), changes


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize(("optimizer", "lr"), [("adam", 1e-3), ("sgd", 0.1)])
def test_output_multiplier_with_the_role_of_an_embedding(name: str, optimizer: str, lr: float) -> None:
    """It serves models that keep their own initialisation, whose logits grow with the width without one."""
    with torch.device("meta"):
        base = BUILD[name](64, "dense")
    changes = []
    for width in (64, 1024):
        torch.manual_seed(0)
        model: Any = BUILD[name](width, "btt(rank=2)")
        head = model.head if hasattr(model, "head") else model.lm_head
        head.register_forward_hook(lambda module, args, y, width=width: y * 64 / width)
        roles = {"head" if hasattr(model, "head") else "lm_head": "input"}
        groups = el.param_groups(model, lr, base=base, optimizer=optimizer, roles=roles)
        changes.append(change(model, groups, optimizer))
    assert changes[1] < changes[0]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_the_order_does_not_matter(optimizer: str) -> None:
    def mult(head_first: bool, base_first: bool) -> dict[str, float]:
        base = Tied(64, "dense", base_first)
        groups = el.param_groups(Tied(256, "btt", head_first), 1e-3, base=base, optimizer=optimizer)
        found = {name: group["lr_mult"] for group in groups for name in group["param_names"]}
        return {("tied" if name in ("head.weight", "embed.weight") else name): m for name, m in found.items()}

    first = mult(head_first=False, base_first=False)
    assert "tied" in first
    for head_first, base_first in ((True, False), (False, True), (True, True)):
        assert mult(head_first, base_first) == first


def test_both_orders_are_initialised_as_the_head() -> None:
    for head_first in (False, True):
        torch.manual_seed(0)
        model = el.init_(Tied(256, "btt", head_first))
        assert model.head.weight is model.embed.weight
        assert float(model.head.weight.detach().std()) == pytest.approx(10 / 256, rel=0.1)
    embedding = nn.ModuleDict({"embed": nn.Embedding(100, 256)})
    before = embedding["embed"].weight.clone()
    assert torch.equal(el.init_(embedding)["embed"].weight, before)


def test_tied_heads_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "einlinear"):
        el.param_groups(Tied(64, "btt", head_first=False), 1e-3, base=None)
        el.param_groups(Tied(64, "btt", head_first=False), 1e-3, base=None, roles={"head": "input"})
    (record,) = caplog.records
    assert record.getMessage() == (
        "taken for matrices, though embeddings are tied to them: embed.weight (100, 64); override with "
        "roles={glob: role}"
    )


def test_a_large_start_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    base = Tied(64, "dense", head_first=True)
    model = Tied(256, "btt", head_first=False)
    el.param_groups(model, 1e-3, base=None)
    el.param_groups(model, 1e-3, base=base, roles={"head": "input"})
    el.param_groups(el.init_(Tied(256, "btt", head_first=False)), 1e-3, base=base)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    el.param_groups(model, 1e-3, base=base)
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "embed.weight is shared by an embedding and a head. Its entries have the size 1" in record.getMessage()
    assert "starts at 0.039" in record.getMessage()
    assert record.getMessage().endswith("base width / width, and pass roles={'embed.weight': 'input'}")


def test_the_example_of_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "guides" / "transfer.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    (code,) = [block for block in blocks if "build_tied" in block]
    names: dict[str, Any] = {"el": el, "nn": nn}
    exec(code, names)
    ids = torch.arange(4)
    with torch.no_grad():
        expected = F.linear(names["tied"][:2](ids), names["tied"][0].weight) / 4
        torch.testing.assert_close(names["tied"](ids), expected)
    assert [g["lr_mult"] for g in names["groups"] if "0.weight" in g["param_names"]] == [1]


def test_bert_is_tied_as_well() -> None:
    def build(width: int) -> nn.Module:
        sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1, "num_attention_heads": 4}
        return BertForMaskedLM(BertConfig(vocab_size=100, **sizes))

    groups = el.param_groups(build(64), 1e-3, base=build(32))
    mult = {name: group["lr_mult"] for group in groups for name in group["param_names"]}
    assert mult["bert.embeddings.word_embeddings.weight"] == 1 / 2
    assert mult["bert.embeddings.position_embeddings.weight"] == mult["cls.predictions.bias"] == 1
