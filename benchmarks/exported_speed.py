"""Speed of exported layers in onnxruntime, beside an exported `torch.nn.Linear` of the same size.

    pip install onnx onnxruntime onnxscript
    python benchmarks/exported_speed.py

Columns: Transpose nodes of the exported graph and of the one that onnxruntime optimised, and times as fast as dense
for every number of tokens. Dense and structured layers run in turns. A ratio compares the fastest run of each.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnx
import onnxruntime
import torch
from torch import nn

import einlinear as el
from einlinear_lab.bench.timing import interleave


def export(layer: nn.Module, features: int, path: Path) -> None:
    """Write the ONNX graph of the layer, for any number of tokens."""
    shapes = ({0: torch.export.Dim("tokens", min=1, max=65536)},)
    torch.onnx.export(layer.eval(), (torch.randn(5, features),), path, dynamic_shapes=shapes, verbose=False)


def load(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """Open the graph in onnxruntime, which writes the optimised graph beside it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.optimized_model_filepath = f"{path}.optimized"
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def transposes(path: Path) -> int:
    """Count the Transpose nodes of a graph."""
    return sum(node.op_type == "Transpose" for node in onnx.load(path, load_external_data=False).graph.node)


def run(session: onnxruntime.InferenceSession, x: object) -> Callable[[], object]:
    """Return a function that runs the graph."""
    return partial(session.run, None, {session.get_inputs()[0].name: x})


def call(calls: dict[str, Callable[[], object]], name: str) -> None:
    calls[name]()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 128])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=100)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    print(f"| features | structure | transposes | {' | '.join(f'tokens: {n}' for n in arguments.tokens)} |")
    print("| --- " * (3 + len(arguments.tokens)) + "|")
    with tempfile.TemporaryDirectory() as folder:
        for d in arguments.features:
            path = Path(folder) / "dense.onnx"
            export(nn.Linear(d, d), d, path)
            dense = load(path, arguments.threads)
            for spec in (f"low_rank(rank={d // 8})", "btt(rank=2)", "monarch(blocks=16)", "dyad"):
                path = Path(folder) / "structured.onnx"
                export(el.Linear(d, d, spec), d, path)
                session, cells = load(path, arguments.threads), []
                for tokens in arguments.tokens:
                    x = torch.randn(tokens, d).numpy()
                    calls = {"dense": run(dense, x), "structured": run(session, x)}
                    # the run before a timed one fills the caches
                    warm = partial(call, calls)
                    times = interleave(calls, "cpu", prepare=warm, rounds=arguments.rounds)
                    cells.append(f"{min(times['dense']) / min(times['structured']):.1f}×")
                count = f"{transposes(path)}, {transposes(Path(f'{path}.optimized'))}"
                print(f"| {d} | `{spec}` | {count} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
