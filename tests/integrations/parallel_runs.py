"""Models with tensor parallelism, and their results; as a script, those of 4 and of 2 processes, in files:

python tests/integrations/parallel_runs.py FOLDER
"""

import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module

import einlinear as el
from einlinear.integrations.tensor_parallel import Colwise, Rowwise

EXAMPLE = Path(__file__).parents[2] / "examples" / "tensor_parallel_gpt.py"
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


class Table(nn.Module):
    """An embedding and a head, with one table if they are tied."""

    def __init__(self, structure: str, is_tied: bool = True) -> None:
        super().__init__()
        self.is_tied = is_tied
        self.table = el.Embedding(64, 32, structure, padding_idx=5)
        self.head = el.Linear(32, 64, structure, bias=False)
        self.tie()

    def tie(self) -> None:
        for factor in self.table.structure.factors if self.is_tied else ():
            setattr(self.head, factor.name, getattr(self.table, factor.name))

    def forward(self, x: Tensor) -> Tensor:
        tokens = (16 * x.detach()[..., 0]).long().remainder(64)
        out: Tensor = self.head(self.table(tokens) + x)[..., 16:48]
        return out


class Routed(nn.Module):
    """Experts as in transformers: the index after the last stands for none."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = el.nn.GatedExperts(
            32, 64, {"gate": "btt", "up": "low_rank(rank=3)", "down": "block_diagonal"}, experts=3, normalize=True
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        indices = tokens.detach()[:, :4].topk(2).indices
        out: Tensor = self.experts(tokens, indices, tokens[:, :2].softmax(1))
        return out.view_as(x)


COLUMN_ROW = {"up": Colwise(), "down": Rowwise()}
SEQUENCE = {"up": Colwise(input_layouts=Shard(1)), "down": Rowwise(output_layouts=Shard(1))}
TABLE = {"table": Rowwise(input_layouts=Replicate()), "head": Colwise(output_layouts=Replicate())}
FEATURES = {"table": Colwise(output_layouts=Replicate())}
TABLES = ("low_rank", "btt", "btt, three cores", "kronecker", "dyad", "mixed sum")
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    **{name: (partial(Pair, spec), COLUMN_ROW) for name, spec in PAIRS.items()},
    "normalize": (partial(Pair, "btt(rank=2)", normalize=True), COLUMN_ROW),
    "padded": (partial(Pair, "btt(rank=2)", features=31), COLUMN_ROW),
    "mixtures": (Mixtures, COLUMN_ROW),
    "feed_forward": (FeedForward, {"block": Colwise()}),
    **{f"table, {name}": (partial(Table, PAIRS[name]), TABLE) for name in TABLES},
    "table, head alone": (partial(Table, "btt(rank=2)"), {"head": TABLE["head"]}),
    "table, features": (partial(Table, "btt(rank=2)", False), FEATURES),
    "table, features of blocks": (partial(Table, PAIRS["dyad, ot"], False), FEATURES),
    "gated_experts": (Routed, {"experts": Colwise()}),
    "sequence": (partial(Pair, "btt(rank=2)"), SEQUENCE),
    "sequence, low_rank": (partial(Pair, "low_rank(rank=3)"), SEQUENCE),
}


# the others are only differentiated
TRAINED = ("dense", "low_rank", "btt", "monarch", "dyad")
FULL = StateDictOptions(full_state_dict=True)


class Network(nn.Module):
    """What is parallel, between layers that are not."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.read, self.norm, self.write = nn.Linear(8, width), nn.LayerNorm(width), nn.Linear(width, 8)
        self.pair = Pair("btt(rank=2)", features=width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.read(x)
        out: Tensor = self.write(h + self.pair(self.norm(h)))
        return out


def build(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name][0]().double()


def build_network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network().double()


def groups_of_network(network: nn.Module, optimizer: str = "adamw") -> list[dict[str, Any]]:
    return el.param_groups(network, lr=1e-2, base=Network(16), optimizer=optimizer, weight_decay=0.1)


def data(features: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x, y = torch.randn(2, 8, 8, features, dtype=torch.float64)
    return x, y


def full(x: Any) -> Tensor:
    """The whole tensor, also of a DTensor; a copy that a file can hold."""
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: full(p) for key, p in model.named_parameters()}


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor, steps: int = 20) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()


def run(name: str, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """Outputs, gradients and training of a model, with the collectives that it needs."""
    model = build(name)
    if mesh is not None:
        model = parallelize_module(model, mesh, MODELS[name][1])
        if isinstance(model, Table):
            model.tie()
    x, target = data(31 if name == "padded" else 32)
    if mesh is not None and name.startswith("sequence"):
        x, target = (tensor.chunk(mesh.size(), 1)[mesh.get_local_rank()] for tensor in (x, target))
    x.requires_grad_()
    with CommDebugMode() as forward:
        y = model(x)
    with CommDebugMode() as backward:
        (y * target).sum().backward()
    counts = [{str(op).split(".")[-1]: n for op, n in mode.get_comm_counts().items()} for mode in (forward, backward)]
    grads = {key: full(p.grad) for key, p in model.named_parameters()}
    if name in TRAINED:
        fit(model, torch.optim.SGD(el.param_groups(model, lr=0.1, base=None, optimizer="sgd")), x.detach(), target)
    return {"y": full(y), "x": full(x.grad), "grads": grads, "counts": counts, "trained": state(model)}


def run_network(mesh: DeviceMesh | None = None, optimizer: str = "adamw") -> tuple[nn.Module, dict[str, Any]]:
    """Training with tensor parallelism within FSDP2, whose processes have a part of the batch each."""
    network, (x, target) = build_network(), data(8)
    if mesh is not None:
        parallelize_module(network.pair, mesh["tp"], COLUMN_ROW)
        fully_shard(network.pair, mesh=mesh["dp"])
        fully_shard(network, mesh=mesh["dp"])
        x, target = (tensor.chunk(2)[mesh["dp"].get_local_rank()] for tensor in (x, target))
    groups = groups_of_network(network, optimizer)
    rates = {name: group["lr"] for group in groups for name in group["param_names"]}
    fit(network, torch.optim.AdamW(groups) if optimizer == "adamw" else el.mup.Muon(groups), x, target, steps=5)
    return network, {"trained": get_model_state_dict(network, options=FULL), "rates": rates}


def four(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (4,))
    results: dict[str, Any] = {name: run(name, mesh) for name in MODELS}
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    network, results["adamw"] = run_network(grid)
    _, results["muon"] = run_network(grid, "muon")
    dcp.save({"model": get_model_state_dict(network)}, checkpoint_id=folder / "2x2")
    pair = parallelize_module(build("btt"), mesh, COLUMN_ROW)
    dcp.save({"model": get_model_state_dict(pair)}, checkpoint_id=folder / "4")
    torch.save(results, folder / f"4-{mesh.get_rank()}.pt")


def two(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    results: dict[str, Any] = {name: run(name, mesh) for name in TRAINED}
    pair, network = build("btt", seed=5), build_network(seed=5)
    parallelize_module(pair, mesh, COLUMN_ROW)
    parallelize_module(network.pair, mesh, COLUMN_ROW)
    for name, model in (("4", pair), ("2x2", network)):
        loaded = {"model": get_model_state_dict(model)}
        dcp.load(loaded, checkpoint_id=folder / name)
        set_model_state_dict(model, loaded["model"])
        results[name] = state(model)
    torch.save(results, folder / f"2-{mesh.get_rank()}.pt")


def example(rank: int, size: int, folder: Path, port: int) -> None:
    """The example, started as torchrun does."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = [str(EXAMPLE), "--tp", "2", "--steps", "4", "--out", str(folder / "example")]
    with (folder / f"example-{rank}.txt").open("w") as file, redirect_stdout(file):
        runpy.run_path(str(EXAMPLE), run_name="__main__")


def start(job: Callable[[Path], None], rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / f'store-{size}'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    job(folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    # torch is imported once, not by every process
    fork = multiprocessing.get_context("fork")
    where = Path(sys.argv[1])
    with socket.create_server(("127.0.0.1", 0)) as server:
        free_port = server.getsockname()[1]
    jobs = [
        [fork.Process(target=start, args=(four, rank, 4, where)) for rank in range(4)],
        [fork.Process(target=start, args=(two, rank, 2, where)) for rank in range(2)],
        [fork.Process(target=example, args=(rank, 4, where, free_port)) for rank in range(4)],
    ]
    for processes in jobs:
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            sys.exit(1)
