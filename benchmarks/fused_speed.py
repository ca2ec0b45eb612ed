"""Speed of fused feed-forward blocks beside the same layers one after the other, and beside dense ones.

    pip install 'einlinear[pretrained]'
    python benchmarks/fused_speed.py

A Llama of two blocks, and one of its MLPs alone, take training steps (forward and backward) and forward passes without
gradients. All linear layers of the blocks are structured; the vocabulary is small, so that the head, which stays dense,
takes little of the time. The weights are random: speed does not depend on them. The three variants of a model run in
turns, and the table has the medians.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import einlinear as el
from einlinear_lab.bench.timing import medians

VOCABULARY = 1024


def variants(hidden: int, spec: str, layers: int, dtype: torch.dtype) -> dict[str, LlamaForCausalLM]:
    """A Llama: dense, with structured layers, and with these fused."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    dense = LlamaForCausalLM(config).to(dtype)
    structured = copy.deepcopy(dense)
    el.convert(structured, spec, exclude="lm_head")
    fused = copy.deepcopy(structured)
    report = el.fuse(fused)
    assert len(report.blocks) == layers
    print(f"\nhidden size {hidden}, {dtype}, `{spec}`: {report.blocks[0].runs}\n")
    print("| hidden size | dtype | structure | part | pass | dense, ms | structured, ms | fused, ms | fusing gains |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    return {"dense": dense, "structured": structured, "fused": fused}


def run_model(model: nn.Module, tokens: int) -> Callable[[], Tensor]:
    ids = torch.arange(tokens)[None] % VOCABULARY
    return lambda: model(ids, labels=ids).loss


def run_mlp(model: nn.Module, tokens: int) -> Callable[[], Tensor]:
    mlp = model.get_submodule("model.layers.0.mlp")
    parameter = next(mlp.parameters())
    x = torch.randn(tokens, model.get_submodule("model.norm").weight.numel(), dtype=parameter.dtype)  # type: ignore[operator, union-attr]
    x.requires_grad_()
    return lambda: mlp(x).sum()


def one_pass(run: Callable[[], Tensor], train: bool) -> None:
    """Run forward, and backward in training."""
    with torch.set_grad_enabled(train):
        result = run()
    if train:
        result.backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="*", default=[1024, 2048], help="sizes of the Llamas")
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--structures", nargs="*", default=["btt"])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, {arguments.tokens} tokens")
    for hidden in arguments.hidden:
        for dtype in arguments.dtypes:
            for spec in arguments.structures:
                torch.manual_seed(0)
                models = variants(hidden, spec, arguments.layers, getattr(torch, dtype))
                for part, prepare in (("MLP", run_mlp), ("model", run_model)):
                    runs = {name: prepare(model, arguments.tokens) for name, model in models.items()}
                    for kind, train in (("training step", True), ("forward", False)):
                        calls = {name: partial(one_pass, run, train) for name, run in runs.items()}
                        seconds = medians(calls, "cpu", arguments.rounds)
                        row = " | ".join(f"{1e3 * time:.1f}" for time in seconds.values())
                        gain = f"{seconds['structured'] / seconds['fused']:.2f}x"
                        print(f"| {hidden} | {dtype} | `{spec}` | {part} | {kind} | {row} | {gain} |", flush=True)


if __name__ == "__main__":
    main()
