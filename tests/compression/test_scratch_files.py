"""A compression with a folder holds little in memory, and ends with the weights of one that holds all there."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import einlinear as el
from einlinear.compression import output_metric, resume_cache, scratch_files
from einlinear.compression.output_metric import measure_output_metrics
from einlinear.compression.resume_cache import ResumeCache
from einlinear.compression.scratch_files import copy_in_file
from einlinear.compression.selection import select_layers
from einlinear_lab.bench.memory import peak_bytes


def is_mapped(tensor: Tensor) -> bool:
    return not tensor.untyped_storage().resizable()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(0,), (), (7, 5)])
def test_a_copy_in_a_scratch_file(
    shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch_files, "_SMALL", 1)
    tensor = (10 * torch.randn(shape)).to(dtype)
    tensor = tensor.T if shape == (7, 5) else tensor
    copied = copy_in_file(tensor, tmp_path)
    assert torch.equal(copied, tensor)
    assert (copied.dtype, copied.shape) == (tensor.dtype, tensor.shape)
    assert is_mapped(copied) == (tensor.numel() > 0)
    copied.zero_()
    assert torch.equal(copy_in_file(tensor, tmp_path), tensor)
    # nothing is left behind
    assert not list(tmp_path.iterdir())


def test_small_tensors_and_those_without_a_folder_stay_in_memory(tmp_path: Path) -> None:
    for copied in (copy_in_file(torch.ones(8), tmp_path), copy_in_file(torch.ones(2**19), None)):
        assert not is_mapped(copied)


def full_disk(*_: object, **__: object) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch_files, "NamedTemporaryFile", full_disk)
    with pytest.raises(OSError, match=r"cannot hold 4,000,000 bytes more: .*No space left"):
        copy_in_file(torch.ones(10**6), tmp_path)
    monkeypatch.setattr(resume_cache, "write_json", full_disk)
    cache = ResumeCache(None, {}, "results")
    cache._folder = tmp_path
    with pytest.raises(OSError, match=r"error_of_0-\w+\.json cannot be written, .* the same call resumes: .*No space"):
        cache.get_or("error of 0", lambda: 0.5)


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(vocab_size=48, num_hidden_layers=3, **sizes, tie_word_embeddings=False)
    return transformers.LlamaForCausalLM(config).eval()


BATCHES = [
    {"input_ids": torch.randint(48, (2, 16), generator=torch.Generator().manual_seed(seed))} for seed in range(4)
]


@pytest.mark.parametrize(("sequential", "count"), [(True, "params"), (False, "macs")])
def test_in_files_as_in_memory(sequential: bool, count: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    llama().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 3
    options: dict[str, Any] = {"count": count, "sequential": sequential}
    inside = llama()
    expected = el.compress(inside, 0.6, ["low_rank", "monarch"], BATCHES, **options)

    monkeypatch.setattr(scratch_files, "_SMALL", 1)
    mapped = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").eval()
    report = el.compress(mapped, 0.6, ["low_rank", "monarch"], BATCHES, cache_dir=tmp_path / "cache", **options)
    structures = [layer.structure for layer in report.layers]
    assert structures == [layer.structure for layer in expected.layers]
    assert len({*structures}) > 2
    for (name, weight), other in zip(mapped.state_dict().items(), inside.state_dict().values(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-5, atol=1e-6, msg=name)
    # no weight was brought into memory, and those that are new are still in the cache
    assert all(is_mapped(weight) for weight in mapped.parameters())
    mapped.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(loaded(**BATCHES[0]).logits, inside(**BATCHES[0]).logits)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        for _ in range(8):
            hidden = hidden.sigmoid()
        return x + self.down(hidden)


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(0.5))


class Model(nn.Module):
    def __init__(self, block: Callable[[], Block], depth: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for block in self.blocks:
            x = block(x)
        return x


DATA = [torch.randn(200, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


@pytest.mark.parametrize("block", [Block, InPlace])
def test_blocks_are_computed_again_for_the_same_metrics(
    block: Callable[[], Block], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(block, 3)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    metrics = measure_output_metrics(model, layers, DATA)
    monkeypatch.setattr(output_metric, "checkpointed_blocks", nullcontext)
    assert metrics.keys() == layers.keys()
    for name, metric in measure_output_metrics(model, layers, DATA).items():
        assert torch.equal(metrics[name].gradient_moment, metric.gradient_moment), name


def test_memory_does_not_grow_with_the_activations_of_all_blocks() -> None:
    model = Model(Block)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    of_block = 4 * 200 * 64 * 10
    # without, some ten times as much
    assert peak_bytes(lambda: measure_output_metrics(model, layers, DATA), "cpu") < 4 * of_block
    assert peak_bytes(lambda: select_layers(model, None, DATA), "cpu") < 4 * of_block


def test_keys_and_values_are_not_collected() -> None:
    model = llama()
    caches: list[Any] = []
    attention = model.model.layers[0].self_attn
    handle = attention.register_forward_pre_hook(
        lambda _, args, kwargs: caches.append(kwargs.get("past_key_values")), with_kwargs=True
    )
    el.compress(model, 0.6, ["low_rank"], BATCHES)
    handle.remove()
    assert caches
    assert set(caches) == {None}
    assert model.config.use_cache is True
