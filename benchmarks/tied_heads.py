"""How much logits change in three steps where a head is tied to an embedding, by width and by the pair's role.

    pip install 'einlinear[pretrained]'
    python benchmarks/tied_heads.py

A model whose learning rates carry over from width to width changes its logits alike at every width. The table has the
root mean square of the change after three steps of Adam, at learning rate 1e-2 for the base width 64. Hidden layers
are btt(rank=2).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import einlinear as el

VOCABULARY, BASE_WIDTH = 97, 64


class ResidualMLP(nn.Module):
    """An embedding, a residual branch, and a head of the same weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, width), nn.Linear(width, VOCABULARY, bias=False)
        self.branch = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.norm = nn.LayerNorm(width)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        logits: Tensor = self.head(self.norm(x + self.branch(x)))
        return logits


def llama(width: int) -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def change(build: Callable[[int], Any], layers: str, width: int, draws: bool, role: str, scales: bool) -> float:
    """The root mean square of the logits' change."""
    torch.manual_seed(0)
    model = build(width)
    el.convert(model, "btt(rank=2)", layers=layers)
    with torch.device("meta"):
        base = build(BASE_WIDTH)
    if draws:
        el.init_(model, base=base)
    head = model.get_submodule("head" if isinstance(model, ResidualMLP) else "lm_head")
    name = next(name for name, parameter in model.named_parameters() if parameter is head.weight)
    if scales:
        head.register_forward_hook(lambda module, inputs, logits: logits * BASE_WIDTH / width)
    optimizer = torch.optim.Adam(el.param_groups(model, 1e-2, base=base, roles={name: role}))
    tokens = torch.randint(VOCABULARY, (64, 8), generator=torch.Generator().manual_seed(1))
    targets = (7 * tokens + 3) % VOCABULARY

    def logits() -> Tensor:
        found = model(tokens)
        return found if isinstance(found, Tensor) else found.logits

    with torch.no_grad():
        before = logits()
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits().flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
    with torch.no_grad():
        return float((logits() - before).square().mean().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256, 1024])
    widths = parser.parse_args().widths
    rows = {
        ("residual MLP, nn.Embedding's own start", "embedding"): (ResidualMLP, "branch.*", False, "input", False),
        ("residual MLP, `el.init_`", "head"): (ResidualMLP, "branch.*", True, "hidden", False),
        ("Llama, transformers' own start", "embedding"): (llama, "*layers*", False, "input", False),
        ("Llama, `el.init_`", "head"): (llama, "*layers*", True, "hidden", False),
        ("Llama, own start, logits times 64 / width", "embedding"): (llama, "*layers*", False, "input", True),
    }
    print(f"| model | rule | {' | '.join(f'width {width}' for width in widths)} |")
    print("| --- | --- |" + " --- |" * len(widths))
    for (model, rule), (build, layers, *how) in rows.items():
        cells = [f"{change(build, layers, width, *how):.2g}" for width in widths]
        print(f"| {model} | {rule} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
