"""Language models of equal parameters with dense and with structured embeddings, tied to the output head.

    pip install 'einlinear[pretrained,lab]'
    tools/fetch_english.sh
    einlinear prepare english --tokens bpe --out data/english-bpe
    python benchmarks/embedding_language_model.py --data data/english-bpe

GPT-2 of two blocks with a vocabulary of 4096. A structured table leaves parameters for a wider model. Every variant
takes the best of four learning rates, for the base of width 64. Prints the validation loss per token.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import einlinear as el
from einlinear.schedules import lr_factor
from einlinear_lab.data.text.tokens import load_tokens

BASE_WIDTH = 64
# width of the model, and the structure of its table and head
VARIANTS = {"dense": (96, None), "low rank": (128, "low_rank(rank=50)"), "BTT": (128, "btt(rank=5)")}
RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2)


def model(width: int, structure: str | None, vocabulary: int, context: int) -> GPT2LMHeadModel:
    sizes = {"n_embd": width, "n_head": width // 32, "n_layer": 2, "n_positions": context, "vocab_size": vocabulary}
    made = GPT2LMHeadModel(
        GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
    )
    if structure:
        el.convert(made, {"*.wte": structure, "lm_head": structure}, layers="lm_head", embeddings="*.wte")
    return made


def batch(tokens: np.ndarray, size: int, context: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(tokens) - context - 1, (size,), generator=generator)
    return torch.stack([torch.from_numpy(tokens[s : s + context + 1].astype(np.int64)) for s in starts.tolist()])


def loss_of(network: GPT2LMHeadModel, rows: Tensor) -> Tensor:
    logits = network(rows[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/english-bpe"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--context", type=int, default=128)
    arguments = parser.parse_args()
    tokens = load_tokens(arguments.data)
    vocabulary = tokens.tokenizer.vocab_size
    generator = torch.Generator().manual_seed(1)
    held_out = [batch(tokens.validation, 32, arguments.context, generator) for _ in range(4)]
    print("| embedding and head | width | parameters | best rate | validation loss | seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, (width, structure) in VARIANTS.items():
        results = {}
        start = time.process_time()
        for rate in RATES:
            torch.manual_seed(0)
            network = model(width, structure, vocabulary, arguments.context)
            base = model(BASE_WIDTH, None, vocabulary, arguments.context)
            optimizer = torch.optim.AdamW(
                el.param_groups(network, rate, base=base, weight_decay=0.1), betas=(0.9, 0.95)
            )
            rates = [group["lr"] for group in optimizer.param_groups]
            generator = torch.Generator().manual_seed(0)
            for step in range(arguments.steps):
                for group, full in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = full * lr_factor("cosine", step, arguments.steps, arguments.steps // 10)
                loss_of(network, batch(tokens.train, arguments.batch_size, arguments.context, generator)).backward()
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                results[rate] = sum(float(loss_of(network.eval(), rows)) for rows in held_out) / len(held_out)
        best = min(results, key=results.__getitem__)
        params, seconds = sum(p.numel() for p in network.parameters()), (time.process_time() - start) / len(RATES)
        print(f"| {name} | {width} | {params:,} | {best:g} | {results[best]:.3f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
