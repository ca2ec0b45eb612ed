"""Speed of converted models beside dense ones.

    pip install 'einlinear[pretrained]'
    python benchmarks/converted_speed.py

T5 reads `wo.weight.dtype` in every feed-forward block, and `torch.nn.TransformerEncoder` hands `linear1.weight` to a
fused operator when it can. Neither may build the dense matrix of a structured layer. Models of the Llama family decode
in bfloat16: all linear layers of two blocks are structured, and the vocabulary is small, so that the head, which stays
dense, takes little of the time. The weights are random: speed does not depend on them. The two variants of
a model run in turns, and the table has the medians.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import einlinear as el
from einlinear_lab.bench.timing import medians


def t5_decoding_one_token(layers: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """A decoding step of T5-small after a prompt, with a cache: dense, and `*.wo` at a quarter of its parameters."""
    config = T5Config(num_layers=layers)
    dense = T5ForConditionalGeneration(config).eval()
    structured = copy.deepcopy(dense)
    rank = el.structure("low_rank", config.d_ff, config.d_model, max_macs=0.25).spec
    el.convert(structured, {"*.wo": rank})
    encoded = dense.encoder(torch.arange(16)[None])
    token = torch.zeros(1, 1, dtype=torch.long)

    def step(model: T5ForConditionalGeneration) -> Callable[[], object]:
        return lambda: model(encoder_outputs=encoded, decoder_input_ids=token)

    return step(dense), step(structured)


def llama(hidden: int, spec: str, layers: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """A decoding step in bfloat16 after a prompt, with a cache: dense, and all layers of the blocks structured."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=min(layers, 2),
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    dense = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    structured = copy.deepcopy(dense)
    wide = 4 * hidden
    sizes = {"*.self_attn.*": (hidden, hidden), "*.gate_proj": (hidden, wide), "*.up_proj": (hidden, wide)}
    sizes["*.down_proj"] = (wide, hidden)
    if "rank=" not in spec:
        # of a family, what has a quarter of the MACs
        specs = {pattern: el.structure(spec, *size, max_macs=0.25).spec for pattern, size in sizes.items()}
    else:
        specs = dict.fromkeys(sizes, spec)
    el.convert(structured, specs)

    def step(model: LlamaForCausalLM) -> Callable[[], object]:
        cache = model(torch.arange(16)[None]).past_key_values
        token = torch.zeros(1, 1, dtype=torch.long)

        def decode() -> None:
            model(token, past_key_values=cache)
            cache.crop(-1)

        return decode

    return step(dense), step(structured)


def encoder(layers: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """`torch.nn.TransformerEncoder` on 4 x 64 tokens: dense on its fast path, and with BTT feed-forward layers."""
    layer = nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True)
    dense = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()
    structured = copy.deepcopy(dense)
    el.convert(structured, {"*linear?": "btt(rank=2)"})
    x = torch.randn(4, 64, 512)
    return (lambda: dense(x)), (lambda: structured(x))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6, help="of each model")
    parser.add_argument("--hidden", type=int, nargs="*", default=[1024, 2048], help="sizes of the Llamas")
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    cases = {
        "T5, one decoded token": t5_decoding_one_token,
        "TransformerEncoder, 4 x 64 tokens": encoder,
    }
    for hidden in arguments.hidden:
        for spec in (f"low_rank(rank={hidden // 4})", "low_rank", "monarch", "btt", "blast(blocks=4)"):
            cases[f"Llama, hidden size {hidden}, one decoded token, `{spec}`"] = partial(llama, hidden, spec)
    print(f"{torch.get_num_threads()} threads\n")
    print("| model | dense, ms | structured, ms | times as fast |")
    print("| --- | --- | --- | --- |")
    for name, case in cases.items():
        torch.manual_seed(0)
        calls = dict(zip(("dense", "structured"), case(arguments.layers), strict=True))
        dense, structured = (1e3 * seconds for seconds in medians(calls, "cpu", arguments.rounds).values())
        print(f"| {name} | {dense:.1f} | {structured:.1f} | {dense / structured:.2f} |", flush=True)


if __name__ == "__main__":
    main()
