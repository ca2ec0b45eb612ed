"""How fast models of transformers run with fewer parameters: tokens per second, by structure and budget.

    pip install 'einlinear[pretrained]'
    python benchmarks/compressed_speed.py

A BERT of the size of all-MiniLM-L6-v2 and a GPT-2 small, with weights that are random: how fast a model runs does not
depend on them. Every linear layer but the output head keeps the same fraction of its parameters. All variants of a
model run in turns.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import einlinear as el
from einlinear.compression.candidates import members
from einlinear.compression.selection import select_layers
from einlinear.nn.dense_layers import features
from einlinear_lab.bench.generation_speed import model_speeds

FAMILIES = ("low_rank", "monarch", "btt", "blast(blocks=4)")
BUDGETS = (0.7, 0.5, 0.3)


def smaller(model: Any, family: str, budget: float) -> Any:
    """Return the model with every layer replaced by the richest member of a family within the budget."""
    layers = select_layers(model, None).layers
    specs = {name: s.spec for name, layer in layers.items() for s in members(family, *features(layer), (budget,))}
    # the other parameters are shared
    structured = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    el.convert(structured, specs, layers=list(specs))
    return structured.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256, help="read at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=None, help="of each model; by default all")
    arguments = parser.parse_args()
    depth = arguments.layers
    models: dict[str, Any] = {
        "BERT, 6 layers of width 384": BertModel(
            BertConfig(hidden_size=384, num_hidden_layers=depth or 6, num_attention_heads=12, intermediate_size=1536)
        ),
        "GPT-2, 12 layers of width 768": GPT2LMHeadModel(GPT2Config(n_layer=depth or 12)),
    }
    print(f"{torch.get_num_threads()} threads, {arguments.tokens} tokens read at once\n")
    print("| model | structure | kept | tokens/s, read at once | times dense | tokens/s, generated | times dense |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, model in models.items():
        variants = {("dense", 1.0): model.eval()}
        variants |= {(family, budget): smaller(model, family, budget) for budget in BUDGETS for family in FAMILIES}
        labels = {f"{family} {budget}": (family, budget) for family, budget in variants}
        speeds = model_speeds(
            {label: variants[which] for label, which in labels.items()}, arguments.tokens, rounds=arguments.rounds
        )
        dense = speeds["dense 1.0"]
        for label, (family, budget) in labels.items():
            speed = speeds[label]
            cells = [name, family, f"{budget:.0%}", f"{speed.prefill:,.0f}", f"{speed.prefill / dense.prefill:.2f}"]
            cells += (
                ["–", "–"]
                if speed.decode is None or dense.decode is None
                else [f"{speed.decode:,.1f}", f"{speed.decode / dense.decode:.2f}"]
            )
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
