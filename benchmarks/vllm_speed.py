"""Tokens per second that vLLM generates on a CPU, dense and structured, in bfloat16.

    make test-vllm
    .venv-vllm/bin/python benchmarks/vllm_speed.py

Models of the Llama family with hidden size 1024, 4 blocks and random weights, on which speed does not depend. All
linear layers of the blocks are structured. Every model runs in a process of its own, one after the other. Prompts have
16 tokens, and 32 are generated for each.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SPECS = ("dense", "low_rank(rank=256)", "monarch(blocks=4)", "btt(rank=2)")


def write(folder: Path, spec: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import einlinear as el

    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 16}
    others = {"vocab_size": 1024, "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **others)).to(torch.bfloat16)
    if spec != "dense":
        el.convert(model, spec, layers="model.layers.*")
    model.save_pretrained(folder)


def measure(folder: Path, requests: int) -> float:
    """Return the tokens that are generated in a second."""
    from vllm import LLM, SamplingParams

    model = LLM(str(folder), skip_tokenizer_init=True, enforce_eager=True, max_model_len=128, dtype="bfloat16")
    config = SamplingParams(temperature=0, detokenize=False, max_tokens=32, ignore_eos=True)
    prompts = [{"prompt_token_ids": [(7 * i + j) % 1000 for j in range(16)]} for i in range(requests)]
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        model.generate(prompts, config, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
    # the first run warms up
    return 32 * requests / min(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8], help="at once")
    parser.add_argument("--folder", type=Path, help="measure this folder alone")
    arguments = parser.parse_args()
    if arguments.folder:
        print(*[f"{measure(arguments.folder, n):.1f}" for n in arguments.requests[:1]])
        return
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    print("| layers |", " | ".join(f"{n} at once, tokens/s" for n in arguments.requests), "|")
    print("| --- |", " | ".join("---" for _ in arguments.requests), "|")
    for spec in SPECS:
        cells = []
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), spec)
            for n in arguments.requests:
                command = [sys.executable, __file__, "--folder", folder, "--requests", str(n)]
                run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                cells.append(run.stdout.split()[-1])
        print(f"| {spec} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
