"""How much memory a compression takes beside one forward pass, where most of it would be in the logits.

    pip install 'einlinear[pretrained]'
    python benchmarks/compression_memory.py

A tiny Llama of a large vocabulary, with random weights. Peaks are those of the process, above what it takes before.
"""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import einlinear as el


def peak(run: Callable[[], object]) -> float:
    """The most megabytes of memory during a call, above those before it (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    (found,) = re.findall(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=128_000)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--width", type=int, default=16)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.width,
        intermediate_size=2 * arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    model: Any = LlamaForCausalLM(config).eval().requires_grad_(False)
    model.model.layers.requires_grad_(True)  # distillation trains the blocks alone
    batches = [{"input_ids": torch.randint(arguments.vocabulary, (4, 128))} for _ in range(2)]
    few = [{"input_ids": batch["input_ids"][:1, :4]} for batch in batches]
    smaller = copy.deepcopy(model)
    el.compress(smaller, 0.6, ["low_rank"], few)  # what every first call takes is no part of a compression
    with torch.no_grad():
        model(**few[0])
        forward = peak(lambda: model(**batches[0]))
    print("| 4 x 128 tokens | peak, MB | times a forward pass |")
    print("| --- | --- | --- |")
    print(f"| forward pass | {forward:.0f} | 1.00 |")
    other = copy.deepcopy(model)
    for name, run in (
        ("`el.compress`", lambda: el.compress(other, 0.6, ["low_rank"], batches)),
        ("`el.distill`", lambda: el.distill(smaller, model, batches, steps=2)),
    ):
        found = peak(run)
        print(f"| {name} | {found:.0f} | {found / forward:.2f} |")


if __name__ == "__main__":
    main()
