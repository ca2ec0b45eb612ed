"""What 4 and 2 processes compute with tensor parallelism, for tests; as a script, it starts them and saves it.

python tests/integrations/parallel_runs.py FOLDER
"""

import multiprocessing
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module

import einlinear as el
from einlinear.integrations.tensor_parallel import Colwise, Rowwise

PAIRS = {
    "dense": "dense",
    "torch": "torch",
    "low_rank": "low_rank(rank=3)",
    "wide low_rank": "low_rank(rank=40)",
    "kronecker": "kronecker",
    "tt": "tt(rank=2)",
    "btt": "btt(rank=2)",
    "btt, three cores": "btt(rank=2, cores=3)",
    "monarch": "monarch",
    "dyad": "dyad",
    "dyad, ot": "dyad(variant=ot)",
    "block_diagonal": "block_diagonal",
    "blast": "blast(blocks=4, rank=2)",
    "sum": "i, r i, o r -> o + i, s i, o s -> o + i, o i -> o where r=2, s=3",
    "mixed sum": "(n k), n o k -> (n o) + i, r i, p r -> p where n=4, r=2",
}


class Pair(nn.Module):
    """Two layers, where the second takes all features that the first makes."""

    def __init__(self, structure: str, normalize: bool = False, features: int = 32) -> None:
        super().__init__()
        make: Callable[..., nn.Module] = nn.Linear if structure == "torch" else partial(el.Linear, structure=structure)
        options: dict[str, Any] = {"normalize": True} if normalize else {}
        self.up, self.down = make(features, 64, **options), make(64, features, **options)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(nn.functional.gelu(self.up(x)))
        return out


class Mixtures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = el.MoELinear(32, 64, "btt", experts=4, active=2)
        self.down = el.MoELinear(64, 32, "low_rank(rank=3)", experts=4, active=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(nn.functional.gelu(self.up(x)))
        return out


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = el.FeedForward(32, 64, "btt(rank=2)", "silu", gated=True, residual=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x)
        return out


COLUMN_ROW = {"up": Colwise(), "down": Rowwise()}
SEQUENCE = {"up": Colwise(input_layouts=Shard(1)), "down": Rowwise(output_layouts=Shard(1))}
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    **{name: (partial(Pair, spec), COLUMN_ROW) for name, spec in PAIRS.items()},
    "normalize": (partial(Pair, "btt(rank=2)", normalize=True), COLUMN_ROW),
    "padded": (partial(Pair, "btt(rank=2)", features=31), COLUMN_ROW),
    "mixtures": (Mixtures, COLUMN_ROW),
    "feed_forward": (FeedForward, {"block": Colwise()}),
    "sequence": (partial(Pair, "btt(rank=2)"), SEQUENCE),
    "sequence, low_rank": (partial(Pair, "low_rank(rank=3)"), SEQUENCE),
}


# the others are only differentiated
TRAINED = ("dense", "low_rank", "btt", "monarch", "dyad", "normalize", "mixtures")


def build(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name][0]().double()


def data(name: str) -> tuple[Tensor, Tensor]:
    features = 31 if name == "padded" else 32
    torch.manual_seed(1)
    x, y = torch.randn(2, 8, 8, features, dtype=torch.float64)
    return x, y


def full(x: Any) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def run(name: str, mesh: DeviceMesh | None = None, train: bool = True) -> dict[str, Any]:
    """Outputs, gradients and training of a model, with the collectives that it needs."""
    model = build(name)
    if mesh is not None:
        model = parallelize_module(model, mesh, MODELS[name][1])
    x, target = data(name)
    if mesh is not None and name.startswith("sequence"):
        x, target = (t.chunk(mesh.size(), 1)[mesh.get_local_rank()] for t in (x, target))
    x.requires_grad_()
    with CommDebugMode() as forward:
        y = model(x)
    with CommDebugMode() as backward:
        (y * target).sum().backward()
    counts = [{str(op).split(".")[-1]: n for op, n in mode.get_comm_counts().items()} for mode in (forward, backward)]
    grads = {key: full(p.grad) for key, p in model.named_parameters()}
    result = {"y": full(y), "x": full(x.grad), "grads": grads, "counts": counts}
    if not train:
        return result
    optimizer = torch.optim.AdamW(el.param_groups(model, lr=1e-2, base=None))
    for _ in range(20):
        optimizer.zero_grad()
        (model(x.detach()) - target).square().mean().backward()
        optimizer.step()
    return {**result, "trained": {key: full(p) for key, p in model.named_parameters()}}


def all_models(mesh: DeviceMesh, folder: Path) -> None:
    results = {}
    import time, traceback
    for name in MODELS:
        if mesh.size() == 4 or name in TRAINED:
            try:
                t=time.time(); c=time.process_time(); results[name] = run(name, mesh, name in TRAINED)
                if mesh.get_rank()==0: print(mesh.size(), name, time.time()-t, time.process_time()-c, results[name]["counts"], file=sys.stderr, flush=True)
            except Exception:
                traceback.print_exc()
    torch.save(results, folder / f"{mesh.size()}-{mesh.get_rank()}.pt")


def worker(rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / f'store-{world_size}'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    all_models(init_device_mesh("cpu", (world_size,)), folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    where = Path(sys.argv[1])
    fork = multiprocessing.get_context("fork")
    for size in map(int, sys.argv[2:] or (4, 2)):
        processes = [fork.Process(target=worker, args=(rank, size, where)) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            if process.exitcode:
                sys.exit(process.exitcode)
