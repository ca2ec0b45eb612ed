"""Tables of embeddings are compressed like linear layers of one-hot vectors: rows count as often as their tokens."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import einlinear as el
from einlinear.compression.embedding_tables import token_frequencies
from einlinear.compression.sensitivity import SensitivityProbe

TOKENS, FEATURES = 40, 12


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.layer = nn.Embedding(TOKENS, FEATURES), nn.Linear(FEATURES, 24)
        self.last = nn.Linear(24, FEATURES)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.last(self.layer(self.table(tokens)).tanh())


def text(batches: int = 8) -> list[Tensor]:
    """The first tokens are frequent, and every token occurs more than once."""
    torch.manual_seed(1)
    frequent = torch.logspace(0, -4, TOKENS).multinomial(batches * 200, replacement=True)
    return [*torch.cat([torch.arange(TOKENS).repeat(2), frequent]).split(240)]


def test_frequencies_leave_room_for_new_tokens() -> None:
    # two of five tokens that were seen once
    assert token_frequencies(torch.tensor([3, 1, 1, 0, 0])).tolist() == pytest.approx([1.8, 0.6, 0.6, 1.0, 1.0])
    # at most what all of them would have if they were alike
    assert token_frequencies(torch.tensor([1, 1, 0])).tolist() == pytest.approx([1, 1, 1])
    assert token_frequencies(torch.tensor([4, 2, 0])).tolist() == pytest.approx([2, 1, 0])
    assert token_frequencies(torch.zeros(3)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("spec", ["low_rank(rank=4)", "btt(rank=2)", "monarch(blocks=3)"])
def test_errors_of_rows_count_as_often_as_their_tokens(spec: str) -> None:
    model, data = Model(), text()
    smaller, plain = copy.deepcopy(model), copy.deepcopy(model)
    report = el.compress(smaller, 0.9, [spec], data, layers=(), embeddings="table")
    el.compress(plain, 0.9, [spec], layers=(), embeddings="table")
    tokens = torch.cat(data)
    right, found, without_data = (m.table(tokens).detach() for m in (model, smaller, plain))
    error, error_without = (float((m - right).square().sum() / right.square().sum()) for m in (found, without_data))
    assert isinstance(smaller.table, el.Embedding)
    assert report.layers[0].error == pytest.approx(error, rel=1e-4)
    assert error < 0.95 * error_without


def test_a_table_is_a_linear_layer_of_one_hot_vectors() -> None:
    model, data = Model(), text()
    linear = nn.Sequential(nn.Linear(TOKENS, FEATURES, bias=False))
    linear[0].weight.data = model.table.weight.detach().T.clone()
    one_hot = [nn.functional.one_hot(tokens, TOKENS).float() for tokens in data]
    of_table = el.compress(model, 0.5, ["low_rank"], data, layers=(), embeddings="table", damping=0)
    of_linear = el.compress(linear, 0.5, ["low_rank"], one_hot, damping=0)
    assert of_table.layers[0].structure == of_linear.layers[0].structure
    # the metric of outputs differs
    assert of_table.layers[0].error == pytest.approx(of_linear.layers[0].error, rel=0.1)


def test_one_budget_for_tables_and_linear_layers() -> None:
    model = Model()
    report = el.compress(model, 0.5, ["low_rank"], text(), embeddings=["tab*"])
    assert [layer.name for layer in report.layers] == ["table", "layer", "last"]
    assert report.params_before == TOKENS * FEATURES + 2 * 24 * FEATURES
    factors = (p for name, p in model.named_parameters() if not name.endswith("bias"))
    assert sum(p.numel() for p in factors) == report.params <= report.params_before / 2
    table = report.layers[0]
    assert (table.macs_before, table.macs) == (0, 0)
    assert all(map(math.isnan, table.speed_up.by_tokens.values()))
    assert str(report).count("table") == 1
    assert model(torch.arange(TOKENS)).shape == (TOKENS, FEATURES)


def test_passes_over_the_data_report_their_progress() -> None:
    """A table has one, in which its tokens are counted; a tied head another, in which its inputs are collected."""

    def passes(model: nn.Module) -> int:
        calls: list[tuple[str, int, int]] = []
        options: dict[str, Any] = {"layers": (), "embeddings": "table", "progress": lambda *call: calls.append(call)}
        el.compress(model, 0.5, ["low_rank"], text(), **options)
        assert {("collecting inputs", done, 7) for done in range(7)} <= {*calls}
        return calls.count(("collecting inputs", 0, 7))

    assert passes(Tied()) == 2 * passes(Model()) > 0


def test_padding_does_not_count() -> None:
    tokens = torch.cat(text()).reshape(4, -1)
    mask = torch.ones_like(tokens)
    mask[:, 1::2] = 0
    padded = tokens.where(mask == 1, torch.tensor(TOKENS - 1))
    kept: list[Any] = [
        [{"tokens": tokens[:, ::2], "attention_mask": mask[:, ::2]}],
        [{"tokens": padded, "attention_mask": mask}],
    ]
    errors = [el.compress(Model(), 0.5, ["low_rank"], data, layers=(), embeddings="table") for data in kept]
    assert errors[0].layers[0].error == pytest.approx(errors[1].layers[0].error, rel=1e-6)


def test_it_resumes(tmp_path: Path) -> None:
    results = []
    for _ in range(2):
        model = Model()
        el.compress(model, 0.5, ["low_rank"], text(), embeddings="table", cache_dir=tmp_path / "cache")
        results.append(model(torch.arange(TOKENS)))
    assert torch.equal(*results)
    with pytest.raises(ValueError, match="another config"):
        el.compress(Model(), 0.5, ["low_rank"], text(), cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embeddings": "nope"}, "embeddings.*nope.*no embedding"),
        ({"embeddings": "table", "count": "macs"}, "embeddings are compressed with count='params' only, not 'macs'"),
        ({"embeddings": "table", "count": "bytes"}, "not 'bytes'"),
        ({"embeddings": 3}, "embeddings must be a glob"),
        ({"layers": ()}, "layers is empty"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    model = Model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((ValueError, TypeError), match=message):
        el.compress(model, 0.5, ["low_rank"], text(), **options)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_tables_that_stay() -> None:
    model: Any = Model()
    model.unused, model.clipped = nn.Embedding(8, 4), nn.Embedding(8, 4, max_norm=1.0)
    skipped = dict(el.compress(model, 0.5, ["low_rank"], text(), embeddings="*").skipped)
    assert skipped["unused"] == "is never called on the calibration data"
    assert "max_norm" in skipped["clipped"]


def test_narrow_leaves_tables_alone() -> None:
    model = Model()
    report = el.compress(model, 0.6, ["narrow", "low_rank"], text(), embeddings="table")
    assert report.layers[0].structure == "dense" or report.layers[0].structure.startswith("low_rank")
    assert model(torch.arange(TOKENS)).shape == (TOKENS, FEATURES)


def test_a_transformers_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=100, **sizes)).eval()
    data = [{"input_ids": torch.randint(0, 100, (4, 16))} for _ in range(4)]
    report = el.compress(model, 0.5, ["low_rank"], data, layers=(), embeddings="*word_embeddings")
    assert report.layers[0].name == "embeddings.word_embeddings"
    model.save_pretrained(tmp_path)
    loaded = transformers.BertModel.from_pretrained(tmp_path).eval()
    assert isinstance(loaded.embeddings.word_embeddings, el.Embedding)
    torch.testing.assert_close(loaded(**data[0]).last_hidden_state, model(**data[0]).last_hidden_state)


class Tied(Model):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.head = nn.Linear(FEATURES, TOKENS, bias=bias)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(super().forward(tokens))


@pytest.mark.parametrize("bias", [False, True])
def test_a_tied_head_shares_the_factors(bias: bool) -> None:
    model = Tied(bias)
    right = model.head.bias
    report = el.compress(model, 0.5, ["low_rank"], text(), embeddings="table")
    assert isinstance(model.head, el.Linear)
    assert all(model.head.get_parameter(name) is factor for name, factor in model.table.named_parameters())
    assert torch.equal(model.head.bias, right) if bias else model.head.bias is None
    assert sum(p.numel() for p in model.parameters() if p.dim() > 1) == report.params
    assert report.tied == (("table", "head"),)
    assert "head has the factors of table" in str(report)
    assert "head" not in dict(report.skipped)


def test_a_tied_head_counts_in_the_fit() -> None:
    """Beside a table alone, the logits are closer, and the rows less close."""
    model, data = Tied(), text()
    tied, alone = copy.deepcopy(model), copy.deepcopy(model)
    alone.head = nn.Linear(FEATURES, TOKENS, bias=False)
    alone.head.weight.data = model.table.weight.detach().clone()
    for smaller in (tied, alone):
        el.compress(smaller, 0.5, ["low_rank"], data, layers=(), embeddings="table")
    tokens = torch.cat(data)
    hidden = Model.forward(model, tokens)
    share = torch.bincount(tokens, minlength=TOKENS) / len(tokens)

    def errors(table: nn.Module) -> tuple[float, float]:
        change = table(torch.arange(TOKENS)) - model.table.weight
        return float(change.square().sum(1) @ share), float((hidden @ change.T).square().sum(0) @ share)

    with torch.no_grad():
        (of_rows, of_logits), (rows_alone, logits_alone) = errors(tied.table), errors(alone.table)
    assert rows_alone < of_rows
    assert of_logits < 0.9 * logits_alone


def test_a_tied_head_changes_with_its_table() -> None:
    model, data = Tied(), text(1)[:1]
    change = 0.1 * torch.randn(TOKENS, FEATURES)
    changed = copy.deepcopy(model)
    changed.table.weight.data += change
    assert changed.head.weight is changed.table.weight
    with torch.no_grad():
        right = model(data[0])
        expected = float((changed(data[0]) - right).square().sum() / right.square().sum())
    found, of_table_alone = (
        SensitivityProbe(model, data, heads).output_change(model.table, change, None)
        for heads in ({"table": "head"}, {})
    )
    assert found == pytest.approx(expected, rel=1e-4)
    assert of_table_alone != pytest.approx(expected, rel=1e-2)


def test_several_owners_of_one_weight_stay() -> None:
    model: Any = Tied()
    model.second = nn.Embedding(TOKENS, FEATURES)
    model.second.weight = model.table.weight
    report = el.compress(model, 0.5, ["low_rank"], text(), embeddings="table")
    assert dict(report.skipped)["table"] == "has its weight tied to head, second"


def test_a_transformers_folder_with_a_tied_head(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=100, tie_word_embeddings=True, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    data = [{"input_ids": torch.randint(0, 100, (4, 16))} for _ in range(4)]
    el.compress(model, 0.5, ["low_rank"], data, layers=(), embeddings="*embed_tokens")
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.lm_head.A is loaded.model.embed_tokens.A
    # the dense weight is tied again
    el.densify(loaded)
    loaded.save_pretrained(tmp_path / "dense")
    dense = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "dense").eval()
    torch.testing.assert_close(dense(**data[0]).logits, model(**data[0]).logits)
    torch.testing.assert_close(loaded(**data[0]).logits, model(**data[0]).logits)
