"""Four ways to spend the same compute on a language model: dense, structured, sparse-to-dense and dense-to-sparse.

    tools/fetch_english.sh && einlinear prepare english --out data/english
    python examples/dense_to_sparse.py

All are GPTs of one width, trained on real English for the same number of multiply-accumulates, whatever that makes of
the number of steps. Dense-to-sparse (Dao et al., arXiv 2204.00595, section 3.3) trains a dense model with half of them,
compresses it to the MACs of the structured one and goes on training; sparse-to-dense trains a structured one with 70 %
of them and goes on with the dense layers that compute the same. Every way is kept in a folder, and goes on after an
interruption.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

import einlinear as el
from einlinear_lab import training
from einlinear_lab.models import ReferenceModel
from einlinear_lab.runs.execution import initialised
from einlinear_lab.runs.run import Run

Way = Callable[[], tuple[ReferenceModel, dict[str, float]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/english")
    parser.add_argument("--structure", default="monarch")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500, help="of the dense model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/dense-to-sparse"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    def run(structure: str, steps: float, **options: Any) -> Run:
        common = {"model": "gpt", "data": arguments.data, "width": arguments.width, "base_width": 128, "d_head": 32}
        common |= {"depth": arguments.depth}
        common |= {"context": 128, "batch_size": 16, "lr": 4e-3, "clip": 1.0, "seed": arguments.seed}
        common |= {"warmup": min(100, round(steps / 4))}
        common |= {"validation_tokens": 131_072, "checkpoint_every": 200, "normalize": False}
        return Run.of(common | {"structure": structure, "steps": round(steps)} | options)

    problem = run("dense", 1000).data.load(arguments.seed)
    macs = {name: run(name, 1000).model.build(problem.shape).macs for name in ("dense", arguments.structure)}
    ratio = macs[arguments.structure] / macs["dense"]  # the structured model takes 1 / ratio as many steps

    def trained(
        what: Run, folder: Path, model: ReferenceModel | None = None
    ) -> tuple[ReferenceModel, dict[str, float]]:
        model = initialised(what, problem) if model is None else model
        base = what.model.base(problem.shape)
        with Progress(transient=True, console=Console(stderr=True)) as bars:
            task = bars.add_task(folder.name, total=what.training.steps)
            outcome = training.train(
                model,
                base,
                problem.task,
                what.training,
                folder,
                lr_scale=model.LR_SCALE,
                metadata={"run": what.config},
                progress=lambda step, *_: bars.update(task, completed=step),
            )
        return model, {"seconds": outcome.step_seconds * len(outcome.losses), **outcome.metrics}

    def dense_to_sparse() -> tuple[ReferenceModel, dict[str, float]]:
        folder, half = arguments.out / "dense-to-sparse", arguments.steps / 2
        model, before = trained(run("dense", half), folder / "dense")
        start = time.monotonic()
        el.densify(model)  # a GPT holds its dense layers as structures of that name
        linears = sum(layer.weight.numel() for layer in model.blocks.modules() if isinstance(layer, torch.nn.Linear))
        budget = 1 - (macs["dense"] - macs[arguments.structure]) / linears  # so that the whole model has those MACs
        calibration = [problem.task.batch(step)[0] for step in range(8)]
        family = arguments.structure.partition("(")[0]
        el.compress(
            model,
            budget,
            [family, "low_rank"],
            calibration,
            count="macs",
            layers="blocks.*",
            cache_dir=folder / "compression",
        )
        compression = time.monotonic() - start
        model, after = trained(run(arguments.structure, half / ratio), folder / "sparse", model)
        seconds = before["seconds"] + compression + after["seconds"]
        return model, after | {"seconds": seconds, "compression": compression}

    sparse_steps = 0.7 * arguments.steps / ratio
    ways: dict[str, Way] = {
        "dense": lambda: trained(run("dense", arguments.steps), arguments.out / "dense"),
        arguments.structure: lambda: trained(
            run(arguments.structure, arguments.steps / ratio), arguments.out / "structured"
        ),
        "sparse-to-dense": lambda: trained(
            run(arguments.structure, sparse_steps + 0.3 * arguments.steps, densify_at=round(sparse_steps)),
            arguments.out / "sparse-to-dense",
        ),
        "dense-to-sparse": dense_to_sparse,
    }
    print("| way | validation loss | MACs per token at the end | seconds | of these, compression |")
    print("| --- | --- | --- | --- | --- |")
    for name, way in ways.items():
        path = arguments.out / f"{name}.json"
        if not path.exists():
            model, found = way()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"macs": model.macs, **found}))
        row = json.loads(path.read_text())
        compression = f"{row['compression']:.0f}" if "compression" in row else "–"
        cells = (name, f"{row['validation_loss']:.4f}", f"{row['macs']:,}", f"{row['seconds']:.1f}", compression)
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
