"""A GPT of structured layers with tensor parallelism and FSDP2, in the style of torchtitan.

    torchrun --nproc-per-node 4 examples/tensor_parallel_gpt.py --tp 2 --out results/tensor-parallel
    python examples/tensor_parallel_gpt.py

Processes are a grid: those of a row share the layers (tensor parallelism, with activations between blocks split along
the sequence), and those of a column share the batch and the memory (FSDP2). Every grid prints the same losses: one
learning rate, structure-aware, and checkpoints that do not depend on the grid. Text is replaced by a chain of tokens,
each a function of the one before with some noise.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import einlinear as el
from einlinear.integrations.tensor_parallel import Colwise, Rowwise

VOCABULARY = 64


class Attention(nn.Module):
    """Causal self-attention, (n, t, width) to the same, with the heads that the projections return."""

    def __init__(self, width: int, d_head: int, structure: str) -> None:
        super().__init__()
        self.d_head = d_head
        self.query = el.Linear(width, width, structure, bias=False)
        self.key = el.Linear(width, width, structure, bias=False)
        self.value = el.Linear(width, width, structure, bias=False)
        self.out = el.Linear(width, width, structure, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        projections = (self.query(x), self.key(x), self.value(x))
        # (n, heads of this process, t, d_head)
        q, k, v = (z.unflatten(-1, (-1, self.d_head)).transpose(1, 2) for z in projections)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=8 / self.d_head)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    def __init__(self, width: int, d_head: int, structure: str) -> None:
        super().__init__()
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, d_head, structure)
        self.feed_forward = el.FeedForward(width, 4 * width, structure)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        out: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return out


class GPT(nn.Module):
    """Logits (n, t, VOCABULARY) of tokens (n, t)."""

    def __init__(self, width: int, depth: int, context: int, structure: str, d_head: int = 16) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, d_head, structure) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device)[None])
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def parallelize(model: GPT, mesh: DeviceMesh) -> None:
    """Apply tensor parallelism, then FSDP2. All parameters are DTensors of one mesh, as clipping needs."""
    embedding = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
    outside = {
        "tokens": embedding,
        "positions": embedding,
        "norm": SequenceParallel(),
        "head": Colwise(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    block_plan = {
        "attention_norm": SequenceParallel(),
        # one gather for query, key and value, whose outputs are whole heads
        "attention": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
        "attention.query": Colwise(),
        "attention.key": Colwise(),
        "attention.value": Colwise(),
        "attention.out": Rowwise(output_layouts=Shard(1)),
        "feed_forward_norm": SequenceParallel(),
        "feed_forward": Colwise(input_layouts=Shard(1), output_layouts=Shard(1)),
    }
    parallelize_module(model, mesh["tp"], outside)
    for block in model.blocks:
        parallelize_module(block, mesh["tp"], block_plan)
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])


def batch(step: int, size: int, context: int) -> Tensor:
    """Return tokens (size, context + 1): three times the last one plus one, or in a tenth of the cases any."""
    generator = torch.Generator().manual_seed(step)
    tokens = [torch.randint(VOCABULARY, (size,), generator=generator)]
    for _ in range(context):
        noise = torch.randint(VOCABULARY, (size,), generator=generator)
        is_noise = torch.rand(size, generator=generator) < 0.1
        tokens.append(torch.where(is_noise, noise, (3 * tokens[-1] + 1) % VOCABULARY))
    return torch.stack(tokens, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--structure", default="btt(rank=2)")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--context", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--tp", type=int, default=1, help="processes that share a layer")
    parser.add_argument("--out", type=Path, help="folder of a checkpoint (DCP) and of the weights (safetensors)")
    arguments = parser.parse_args()
    sizes = arguments.depth, arguments.context, arguments.structure

    torch.manual_seed(0)
    model = GPT(arguments.width, *sizes)
    el.init_(model, zero="head")
    with torch.device("meta"):
        base = GPT(64, *sizes)

    is_parallel = "RANK" in os.environ
    rank, part, parts = 0, 0, 1
    if is_parallel:
        dist.init_process_group("gloo")
        rank, parts = dist.get_rank(), dist.get_world_size() // arguments.tp
        mesh = init_device_mesh("cpu", (parts, arguments.tp), mesh_dim_names=("dp", "tp"))
        part = mesh["dp"].get_local_rank()
        parallelize(model, mesh)

    groups = el.param_groups(model, lr=arguments.lr, base=base, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups)
    for step in range(arguments.steps):
        tokens = batch(step, arguments.batch_size, arguments.context).chunk(parts)[part]
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean = loss.detach()
        if is_parallel:
            dist.all_reduce(mean, group=mesh["dp"].get_group())
        if rank == 0:
            print(f"step {step + 1:3d}  loss {mean.item() / parts:.4f}", flush=True)

    if arguments.out:
        dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=arguments.out / "checkpoint")
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank == 0:
            save_file(weights, arguments.out / "model.safetensors")
    if is_parallel:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
