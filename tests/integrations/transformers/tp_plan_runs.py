"""Models of transformers on 2 processes by their `tp_plan`, and their results in files:

python tests/integrations/transformers/tp_plan_runs.py FOLDER
"""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.distributed import DistributedConfig

import einlinear as el

_SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
_SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
_SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
TOKENS = torch.arange(12).reshape(2, 6) * 5 % 64
_BLOCKS = {"*.0.self_attn.*": "btt(rank=2)", "*.0.mlp.*": "low_rank(rank=3)", "*.1.mlp.up_proj": "btt(rank=2)"}
# the whole layer for every process
WHOLE_HEAD = {"lm_head": "replicate"}


def llama(vocabulary: int = 64) -> PreTrainedModel:
    """Structured layers, dense ones, and a structured head."""
    model = LlamaForCausalLM(LlamaConfig(**{**_SIZES, "vocab_size": vocabulary}))
    el.convert(model, {**_BLOCKS, "lm_head": "low_rank(rank=4)"}, normalize="*.up_proj")
    return model


def qwen2() -> PreTrainedModel:
    """With biases of queries, keys and values, and a structured table that the head shares."""
    model = Qwen2ForCausalLM(Qwen2Config(**_SIZES, tie_word_embeddings=True))
    table = "low_rank(rank=4)"
    el.convert(model, {**_BLOCKS, "*embed_tokens": table, "lm_head": table}, embeddings="*")
    model.config.tie_word_embeddings = False
    return model


def mixtral() -> PreTrainedModel:
    model = MixtralForCausalLM(MixtralConfig(**_SIZES, num_local_experts=4))
    el.convert(model, {"*.mlp.experts": "low_rank(rank=3)"})
    return model


def quantized() -> PreTrainedModel:
    model = LlamaForCausalLM(LlamaConfig(**_SIZES))
    for block in model.model.layers:
        block.mlp.up_proj = el.nn.QuantizedLinear(32, 64, "btt", bias=False, precision="int8")
    return model


MAKERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "odd head": lambda: llama(63),
    "qwen2": qwen2,
    "mixtral": mixtral,
    "quantized": quantized,
}
# by the name of a result: a folder, and how it is loaded
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"distributed_config": DistributedConfig(tp_size=2)}),
    "qwen2": ("qwen2", {"tp_plan": "auto"}),
    "mixtral": ("mixtral", {"distributed_config": DistributedConfig(tp_size=2)}),
    "odd head": ("odd head", {"distributed_config": DistributedConfig(tp_size=2, tp_plan=WHOLE_HEAD)}),
}
MISTAKES: dict[str, tuple[str, DistributedConfig]] = {
    "does not fit": ("odd head", DistributedConfig(tp_size=2)),
    "style": (
        "llama",
        DistributedConfig(tp_size=2, tp_plan={"model.layers.*.mlp.up_proj": "packed_colwise"}),
    ),
    "experts": ("mixtral", DistributedConfig(ep_size=2, tp_size=2)),
    "quantized": ("quantized", DistributedConfig(tp_size=2)),
}


def full(x: Any) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def run(model: PreTrainedModel) -> dict[str, Any]:
    output = model(TOKENS % model.config.vocab_size, labels=TOKENS % model.config.vocab_size)
    output.loss.backward()
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    return {
        "logits": full(output.logits),
        "gradients": {name: full(p.grad) for name, p in model.named_parameters()},
        "tokens": model.generate(TOKENS[:1] % model.config.vocab_size, **options),
        "sharded": {
            name for name, p in model.named_parameters() if isinstance(p, DTensor) and p.to_local().shape != p.shape
        },
    }


def work(rank: int, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    results: dict[str, Any] = {}
    for name, (source, options) in CASES.items():
        model = AutoModelForCausalLM.from_pretrained(folder / source, **options)
        results[name] = run(model)
        model.save_pretrained(folder / f"{name} saved")
    results["mistakes"] = {}
    for name, (source, config) in MISTAKES.items():
        try:
            AutoModelForCausalLM.from_pretrained(folder / source, distributed_config=config)
        except (TypeError, ValueError) as error:
            results["mistakes"][name] = f"{type(error).__name__}: {error}"
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def save_models(folder: Path) -> None:
    for name, make in MAKERS.items():
        torch.manual_seed(0)
        model = make().double()
        with torch.no_grad():
            for parameter in model.parameters():
                # a bias or a gamma that is lost is noticed
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.save_pretrained(folder / name)


if __name__ == "__main__":
    where = Path(sys.argv[1])
    save_models(where)
    # torch is imported once, not by every process
    fork = multiprocessing.get_context("fork")
    with socket.create_server(("127.0.0.1", 0)) as server:
        free_port = server.getsockname()[1]
    processes = [fork.Process(target=work, args=(rank, where, free_port)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))
