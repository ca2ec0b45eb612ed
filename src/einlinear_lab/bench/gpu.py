"""The cases of `tools/gpu_day.sh` on a GPU (or, to rehearse, on a CPU).

A part is a dictionary: name of a case -> function that measures the case and returns a row of JSON values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from einlinear.nn import MoELinear
from einlinear.ops.context import backend
from einlinear_lab.bench import mixtures
from einlinear_lab.bench.cases import DTYPES, SUITES, BenchConfig, Case
from einlinear_lab.bench.machine import Roofline, measure_roofline
from einlinear_lab.bench.memory import peak_bytes
from einlinear_lab.bench.run import measure
from einlinear_lab.bench.timing import interleave, spread
from einlinear_lab.bench.variants import DENSE, FUSED
from einlinear_lab.models import GPT

Row = dict[str, Any]
Items = dict[str, Callable[[], Row]]

BATCHED, TRITON = "batched", "triton"
BACKENDS = (BATCHED, TRITON)
_EXPERTS, _ACTIVE = 8, 2
_VOCAB = 128


@dataclass(frozen=True)
class Sizes:
    """The sizes of all cases, those that matter most first, and the seconds that a case is repeated for."""

    device: str = "cuda"
    structures: tuple[str, ...] = SUITES["gpu"].structures
    # of feed-forward blocks, with four times as many hidden features
    block_structures: tuple[str, ...] = ("btt", "low_rank(rank={d/8})")
    block_features: tuple[int, ...] = (4096, 1024)
    block_dtype: str = "bfloat16"
    # of mixtures and GPTs
    structure: str = "btt"
    features: tuple[int, ...] = (4096, 1024, 8192, 2048)
    tokens: int = 16384
    mixtures: tuple[int, ...] = (4096, 1024)
    # of the GPTs
    widths: tuple[int, ...] = (1024, 2048)
    context: int = 256
    d_head: int = 64
    depth: int = 6
    budget: float = 0.25


# structures of few kernels, as Triton's interpreter is slow
TINY = Sizes(
    device="cpu",
    structures=("low_rank(rank=4)", "dyad(blocks=2)"),
    block_structures=("low_rank(rank=2)",),
    block_features=(4,),
    # the interpreter truncates to bfloat16 instead of rounding
    block_dtype="float32",
    structure="block_diagonal(blocks=2)",
    features=(16,),
    tokens=17,
    mixtures=(8,),
    widths=(8,),
    context=8,
    d_head=8,
    depth=1,
    budget=0.0,
)


def layer_cases(sizes: Sizes) -> list[Case]:
    """Return the cases of the suite "gpu", size by size."""
    suite = dataclasses.replace(SUITES["gpu"], structures=sizes.structures, device=sizes.device, tokens=(sizes.tokens,))
    grids = (dataclasses.replace(suite, sizes=((d, d),)).cases() for d in sizes.features)
    return [case for grid in grids for case in grid]


def layers(sizes: Sizes, compiled: bool) -> Items:
    """Measure layers by all variants; `compiled` adds torch.compile."""
    config = BenchConfig(sizes.budget, BACKENDS, compiled)
    return {str(case): partial(_measure_layer, case, config) for case in layer_cases(sizes)}


def block_cases(sizes: Sizes) -> list[Case]:
    """Return the cases of feed-forward blocks, gated and not, size by size."""
    suite = dataclasses.replace(SUITES["gpu"], structures=sizes.block_structures, device=sizes.device)
    blocks, dtypes = SUITES["blocks"].blocks, (sizes.block_dtype,)
    suite = dataclasses.replace(suite, tokens=(sizes.tokens,), blocks=blocks, dtypes=dtypes)
    grids = (dataclasses.replace(suite, sizes=((d, 4 * d),)).cases() for d in sizes.block_features)
    return [case for grid in grids for case in grid]


def blocks(sizes: Sizes) -> Items:
    """Measure feed-forward blocks: dense, one layer after the other by backend, and fused by the Triton kernels."""
    config = BenchConfig(sizes.budget, BACKENDS)
    return {str(case): partial(_measure_layer, case, config) for case in block_cases(sizes)}


@cache
def _roofline(dtype: str, device: str) -> Roofline:
    # a rehearsal does not need the peaks of a CPU
    return Roofline(1e12, 1e11) if device == "cpu" else measure_roofline(dtype, device)


def _measure_layer(case: Case, config: BenchConfig) -> Row:
    result = measure(case, config, _roofline(case.dtype, case.device))
    measured = {m.name: m for m in result.measurements}
    return {
        "pass": case.mode,
        "limit": result.limit,
        "roofline_ms": 1000 * result.roofline_seconds,
        "ms": {name: _milliseconds(m.seconds) for name, m in measured.items() if m.seconds},
        "peak_mb": {name: m.peak_bytes / 1e6 for name, m in measured.items() if m.peak_bytes},
        "failed": [f"{m.name}: {m.refusal}" for m in result.failures],
        "refused": {name: m.refusal for name, m in measured.items() if m.refusal and not m.wrong},
    }


def mixture_layers(sizes: Sizes) -> Items:
    """Measure el.MoELinear with 8 experts, of which 2 are active, by backend, against a dense layer without experts."""
    grid = [(d, mode) for d in sizes.mixtures for mode in mixtures.MODES]
    cases = [Case(sizes.structure, d, d, sizes.tokens, mode, "bfloat16", sizes.device) for d, mode in grid]
    return {str(case): partial(_measure_mixture, case, sizes.budget) for case in cases}


def _measure_mixture(case: Case, budget: float) -> Row:
    torch.manual_seed(0)
    size, training = (case.in_features, case.out_features), case.mode == "train"
    options: dict[str, Any] = {"bias": False, "device": case.device, "dtype": DTYPES[case.dtype]}
    x, grad = (torch.randn(case.tokens, d, device=case.device, dtype=options["dtype"]) for d in size)
    x.requires_grad_(training)
    mixture = MoELinear(*size, case.structure, _EXPERTS, _ACTIVE, **options)
    nn.init.normal_(mixture.router, std=case.in_features**-0.5)

    def step(module: nn.Module, name: str | None) -> None:
        with backend(name), torch.set_grad_enabled(training):
            y = module(x)
        if training:
            torch.autograd.grad(y, [x, *module.parameters()], grad)

    calls = {DENSE: partial(step, nn.Linear(*size, **options), None)}
    for name in BACKENDS:
        with backend(name):
            try:
                mixtures.check_mixture(mixture, x, grad, training)
            except RuntimeError as error:
                raise RuntimeError(f"{name}: {error}") from error
        calls[name] = partial(step, mixture, name)
    return {"pass": case.mode, "failed": [], **_timed(calls, case.device, budget)}


def gpts(sizes: Sizes) -> Items:
    """Measure training steps of a dense and a structured GPT on random characters: bf16 autocast, AdamW.

    The structured one runs layer by layer with every backend, and with fused feed-forward blocks.
    """
    return {f"width {width}, depth {sizes.depth}": partial(_measure_gpts, sizes, width) for width in sizes.widths}


def _measure_gpts(sizes: Sizes, width: int) -> Row:
    torch.manual_seed(0)
    text = torch.randint(_VOCAB, (max(1, sizes.tokens // sizes.context), sizes.context + 1), device=sizes.device)
    config: dict[str, Any] = {"context": sizes.context, "depth": sizes.depth, "d_head": sizes.d_head}

    def step(model: GPT, optimizer: torch.optim.Optimizer, name: str | None) -> None:
        optimizer.zero_grad()
        # fused blocks compute hidden features again
        choice = (TRITON, None) if name == FUSED else (name, False)
        with backend(choice[0], recompute=choice[1]), torch.autocast(sizes.device, torch.bfloat16):
            loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        loss.backward()
        optimizer.step()

    calls, parameters = {}, {}
    for structure in ("dense", sizes.structure):
        model = GPT(_VOCAB, width, structure=structure, **config).to(sizes.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        for name in (None,) if structure == "dense" else (*BACKENDS, FUSED):
            calls[name or DENSE] = partial(step, model, optimizer, name)
            parameters[name or DENSE] = sum(p.numel() for p in model.parameters())
    return {"pass": "train", "failed": [], "parameters": parameters, **_timed(calls, sizes.device, 12 * sizes.budget)}


def _timed(calls: Mapping[str, Callable[[], None]], device: str, budget: float) -> Row:
    """Return the times of calls in interleaved rounds, and their peak memory."""
    for call in calls.values():
        call()
    peaks = {name: peak_bytes(call, device) / 1e6 for name, call in calls.items()}
    times = interleave(calls, device, budget)
    return {"ms": {name: _milliseconds(spread(seconds)) for name, seconds in times.items()}, "peak_mb": peaks}


def _milliseconds(seconds: Any) -> list[float]:
    """Return the median and the quartiles."""
    return [float(f"{1000 * value:.6g}") for value in vars(seconds).values()]
