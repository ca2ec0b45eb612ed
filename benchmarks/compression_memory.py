"""How much memory a compression takes beside one forward pass, or beside the weights of a model in files.

    pip install 'einlinear[pretrained]'
    python benchmarks/compression_memory.py
    python benchmarks/compression_memory.py --saved bfloat16 --width 1024 --layers 18 --vocabulary 32000

A Llama with random weights. By default it is tiny, and most of its memory would be in the logits; peaks are those of
the process, above what it takes before. With --saved, the weights are in files, and the peak is that of the process,
with its libraries and with the pages of the files that are in memory.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import einlinear as el
from einlinear_lab.cli.parsing import parse_bytes
from einlinear_lab.pretrained.memory_limit import limited_memory, peak_bytes_of_process


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
    parser.add_argument("--saved", choices=["float32", "bfloat16"])
    parser.add_argument("--hidden", type=int, help="features between the layers of an MLP; default: twice the width")
    parser.add_argument("--compress", metavar="GLOB", help="layers to compress with --saved; default: all")
    parser.add_argument("--max-memory", help="a limit with --saved, such as 2GB")
    parser.add_argument("--folder", type=Path, default=Path(), help="where --saved writes its files, for a while")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.width,
        intermediate_size=arguments.hidden or 2 * arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=max(2, arguments.width // 64),
        tie_word_embeddings=False,
    )
    if arguments.saved:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            compress_saved(Path(folder), config, arguments)
        return
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


def compress_saved(folder: Path, config: Any, arguments: argparse.Namespace) -> None:
    """Compress a model from files to half of its parameters, and print the peak of the process."""
    save_random(folder / "model", config, getattr(torch, arguments.saved))
    model: Any = LlamaForCausalLM.from_pretrained(folder / "model", dtype="auto").eval()
    size = sum(parameter.nbytes for parameter in model.parameters())
    batches = [{"input_ids": torch.randint(config.vocab_size, (1, 32))} for _ in range(2)]
    options: dict[str, Any] = {"layers": arguments.compress, "cache_dir": folder / "cache"}
    print("| model, MB | before, MB | peak, MB | times the model | seconds |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    before, started = _status("VmRSS") * 1024, time.monotonic()
    Path("/proc/self/clear_refs").write_text("5")
    limit = arguments.max_memory and parse_bytes(arguments.max_memory, "--max-memory")
    with limited_memory(limit) if limit else nullcontext():
        el.compress(model, 0.5, ["low_rank"], batches, **options)
        model.save_pretrained(folder / "out", max_shard_size="500MB")
    peak, seconds = peak_bytes_of_process(), time.monotonic() - started
    numbers = f"{size / 1e6:,.0f} | {before / 1e6:,.0f} | {peak / 1e6:,.0f}"
    print(f"| {numbers} | {(peak - before) / size:.2f} | {seconds:,.0f} |")


def save_random(folder: Path, config: Any, dtype: torch.dtype) -> None:
    """Write random weights, one file for each block, without ever holding all of them."""
    config.architectures, config.dtype = ["LlamaForCausalLM"], dtype
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    files: dict[str, str] = {}
    for name in shapes:
        block = re.match(r"model\.layers\.\d+|.*", name)
        assert block is not None
        files[name] = f"{block[0]}.safetensors"
    for file in dict.fromkeys(files.values()):
        mine = [name for name in shapes if files[name] == file]
        save_file({name: random_weight(shapes[name], dtype) for name in mine}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def random_weight(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype) if len(shape) == 1 else 0.02 * torch.randn(shape, dtype=dtype)


if __name__ == "__main__":
    main()
