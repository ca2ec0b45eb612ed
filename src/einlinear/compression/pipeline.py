"""Pipeline of `compress`: calibrate, measure sensitivity, allocate, fit."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache as once
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, SupportsFloat, TypeVar

import torch
from torch import Tensor, nn

from einlinear.compression.allocation import allocate_faster, check_budget
from einlinear.compression.calibration import Calibration, naming_layer
from einlinear.compression.candidates import (
    DEFAULT_FAMILIES,
    LayerCandidate,
    Spectrum,
    estimated_errors,
    fitted_errors,
    members,
    members_to_fit,
    reason_for_none,
)
from einlinear.compression.compression_report import CompressedLayer, CompressionReport
from einlinear.compression.fitting import FittedLayer, fit_layers
from einlinear.compression.resume_cache import ResumeCache, digest_of
from einlinear.compression.second_moments import InputStatistics
from einlinear.compression.selection import select_layers, weight_of
from einlinear.compression.sensitivity import UNKNOWN, Sensitivity, SensitivityProbe, measure_sensitivity
from einlinear.compression.timing import LayerTimer
from einlinear.conversion.replacement import put, structured_like
from einlinear.nn.layer_kinds import features
from einlinear.nn.model_call import Batch, evaluating
from einlinear.structures import Structure

T = TypeVar("T")
# called with the current step, how much of it is done, and of how much
Progress = Callable[[str, int, int], None]


def compress(
    model: nn.Module,
    budget: float,
    structures: Sequence[str] = DEFAULT_FAMILIES,
    calibration: Iterable[Batch] | None = None,
    *,
    count: str = "params",
    layers: str | Sequence[str] | None = None,
    sequential: bool = True,
    damping: float = 1e-2,
    only_if_faster: bool = False,
    progress: Progress | None = None,
    folder: str | Path | None = None,
    shared: str | Path | None = None,
) -> CompressionReport:
    """Replace linear layers by structured ones that together keep a share of the parameters or MACs, in place.

    Each layer gets its own structure and rank, or stays dense, so that the model's output changes least within the
    budget. There are four steps: collect the inputs of all layers on calibration data, measure how sensitive the output
    is to an error of each layer, allocate a structure to each layer, and fit it. Without calibration data, weights are
    approximated instead of outputs.

    Args:
        model: any module with `torch.nn.Linear` or transformers' Conv1D layers inside.
        budget: the fraction to keep, above 0 and at most 1, of what `count` says of all the layers' weights together.
        structures: families, whose rank or blocks are chosen per layer ("low_rank", "blast(blocks=4)"), or complete
            structures ("btt(rank=2)").
        calibration: batches to call the model with: tensors, sequences of positional arguments, or mappings of named
            ones. An "attention_mask" of (batch, tokens) marks padding. The output that counts is `logits`,
            `last_hidden_state`, or else the first tensor that the model returns, and gradients have to reach it: wrap
            a model that returns several, such as two towers, to return them concatenated, and one that ends in an
            argmax, or runs without gradients, to return logits. None: weights are approximated.
        count: "params" or "macs".
        layers: a glob, or several, on qualified names; None: all but output heads (below).
        sequential: fit layer after layer, each on the outputs of the compressed layers before it, to the original's
            outputs; False: fit all layers on the original's inputs.
        damping: fraction of the mean variance that is added to the variance of every direction of the inputs, at least
            0; float32 rounding sets a lower bound.
        only_if_faster: use only structures that are at least as fast as the dense layer on this machine, for 1 token
            and for 256 (within 5 %, by which timings are off). The budget may then not be reached: the report says so.
        progress: called with the current step, and how much of it is done, of how much; for the first time at once.
        folder: resume cache. After an interruption the same call resumes from it. It is not removed at the end.
        shared: resume cache for sensitivities and errors of candidates, which are most of the work: compressions of the
            same model on the same data, to other budgets or with other structures, share it.

    Returns:
        A report on every layer, and on the share of the whole model that they are; print it.

    A layer that no structure fits stays dense, and the report says why. Output heads stay dense unless `layers` names
    them:

    - the output embeddings of transformers' language models and the last layers of its classifiers;
    - what a model's `get_classifier()` returns, as timm's models have it;
    - the last linear layer of a model if it is, or is in, a module called classifier, fc, head, heads or lm_head;
    - with calibration data, a layer whose outputs are the model's. Exceptions are a plain `torch.nn.Sequential`, and a
      model with as many output features as its first layer has inputs, such as an autoencoder: their last layer is
      compressed.

    Raises:
        TypeError: a model, a budget or calibration data of the wrong type; batches that do not fit the forward pass.
        ValueError: no layer to compress, a budget that nothing reaches, no calibration data, weights or inputs that are
            NaN or infinite (it names the layer), a folder of another compression. The model is then unchanged.
        ModuleNotFoundError: scipy is not installed, or with a folder safetensors; the extra `pretrained` has both.

    Example:
        >>> import torch, einlinear as el
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
        >>> report = el.compress(model, 0.5, ["low_rank", "monarch"], calibration=[torch.randn(512, 64)])
        >>> report.params <= 0.5 * report.params_before
        True
    """
    families = [structures] if isinstance(structures, str) else list(structures)
    batches = _check_arguments(model, budget, families, calibration, count, damping)
    is_cached = folder is not None or shared is not None
    _check_installed("scipy", *(("safetensors",) if is_cached else ()))
    report_progress = progress or (lambda step, done, of: None)
    report_progress("looking at the model", 0, 1)
    # compiled code ignores new hooks
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        # copies the modules and shares their tensors: the original stays the reference
        compressed = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
        selection = select_layers(model, layers, batches)
        dense = selection.layers
        structured = {
            name: {family: list(members(family, *features(layer))) for family in families}
            for name, layer in dense.items()
        }
        unfit = {
            name: None if any(structured[name].values()) else reason_for_none(families, *features(layer))
            for name, layer in dense.items()
        }
        total = sum(weight_of(layer).numel() for layer in dense.values())
        check_budget(dense, budget, count, structured, unfit)
        data_config = {"damping": damping, "model and data": digest_of(model, batches) if is_cached else None}
        config = {"budget": budget, "structures": families, "count": count, "layers": list(dense)}
        config |= {"sequential": sequential, "only_if_faster": only_if_faster, **data_config}
        cache = ResumeCache(folder, config, "an unfinished compression")
        measured = cache if shared is None else ResumeCache(shared, data_config, "errors of candidates")
        report_progress("looking at the model", 1, 1)

        # 1. calibrate
        calibrated = Calibration(model, selection, batches, partial(report_progress, "collecting inputs"))

        # 2. measure the sensitivity to each layer, and the errors of its candidates
        probe = None if batches is None else SensitivityProbe(model, batches)
        sensitivities: dict[str, Sensitivity] = {}
        candidates: dict[str, list[LayerCandidate]] = {}
        comparing = partial(report_progress, "comparing structures")
        for name, statistics in calibrated.statistics(calibrated.stages):
            advance = partial(comparing, len(candidates), len(dense))
            sensitivities[name], candidates[name] = _measure(
                name, dense[name], structured[name], count, damping, probe, statistics, measured, advance
            )
        comparing(len(dense), len(dense))

        # 3. allocate
        timer = LayerTimer(lambda done: report_progress("timing layers", done, len(dense)))

        def is_slower(name: str, spec: str) -> bool:
            return only_if_faster and timer(dense[name], structured_like(dense[name], spec)).is_slower

        def choose() -> dict[str, Any]:
            chosen, slow = allocate_faster(candidates, int(budget * total), is_slower)
            return {"structures": _specs(chosen), "slow": slow}

        def decode(record: Any) -> dict[str, LayerCandidate]:
            unfit.update(dict.fromkeys(record["slow"], "every structure tried is slower than the dense layer"))
            specs = record["structures"]
            return {name: {c.spec: c for c in candidates[name]}[specs[name]] for name in dense}

        chosen = cache.get_or("allocation", choose, decode)

        # 4. fit
        specs = {name: spec for name, spec in _specs(chosen).items() if spec != "dense"}
        fitting = partial(report_progress, "fitting")
        fitted = fit_layers(
            calibrated,
            compressed,
            specs,
            damping,
            sequential and batches is not None,
            cache,
            lambda done: fitting(done, len(specs)),
        )
    reports = [
        _report(name, layer, chosen[name], fitted.get(name), sensitivities[name], timer, unfit[name])
        for name, layer in dense.items()
    ]
    missed = sum(getattr(layer, count) for layer in reports) > budget * total
    put(model, {id(dense[name]): new.layer.train(dense[name].training) for name, new in fitted.items()})
    return CompressionReport(tuple(reports), tuple(selection.skipped), selection.coverage, budget if missed else None)


def _specs(candidates: Mapping[str, LayerCandidate]) -> dict[str, str]:
    return {name: candidate.spec for name, candidate in candidates.items()}


def _measure(
    name: str,
    layer: Any,
    families: Mapping[str, Sequence[Structure]],
    count: str,
    damping: float,
    probe: SensitivityProbe | None,
    statistics: Callable[[], InputStatistics],
    cache: ResumeCache,
    progress: Callable[[], None],
) -> tuple[Sensitivity, list[LayerCandidate]]:
    """The sensitivity to a layer, and its candidates, "dense" among them."""
    inputs, weight = once(statistics), weight_of(layer)

    def cached(key: str, compute: Callable[[InputStatistics], Any], decode: Callable[[Any], T]) -> T:
        def record() -> Any:
            inputs()
            progress()
            with naming_layer(name, damping):
                return compute(inputs())

        return cache.get_or(f"{key} of {name}", record, decode)

    sensitivity = UNKNOWN
    if probe is not None:
        sensitivity = cached(
            "sensitivity", lambda x: measure_sensitivity(layer, x, damping, probe).points, Sensitivity.of
        )
    spectrum = cached("spectrum", lambda x: asdict(Spectrum.of(weight, x.damped(damping))), Spectrum.from_record)
    candidates = [LayerCandidate("dense", weight.numel(), 0.0, 0.0)]
    for family, structures in families.items():
        fitted = members_to_fit(structures)
        errors = cached(
            f"errors of {family}",
            partial(fitted_errors, fitted, layer, damping),
            lambda record, fitted=fitted: {s.spec: float(record[s.spec]) for s in fitted},  # type: ignore[misc]
        )
        estimates = estimated_errors(structures, errors, spectrum)
        candidates += [
            LayerCandidate(s.spec, getattr(s, count), estimates[s.spec], sensitivity.at(estimates[s.spec]))
            for s in structures
        ]
    return sensitivity, candidates


def _report(
    name: str,
    old: nn.Module,
    chosen: LayerCandidate,
    new: FittedLayer | None,
    sensitivity: Sensitivity,
    timer: LayerTimer,
    reason: str | None,
) -> CompressedLayer:
    size, slope = weight_of(old).numel(), sensitivity.slope
    if new is None:
        return CompressedLayer(name, "dense", size, size, size, chosen.error, 0.0, slope, reason=reason)
    s = new.layer.structure
    tokens_per_input = new.tokens / s.in_features if new.tokens else None
    counts, errors = (size, s.params, s.macs), (chosen.error, new.error)
    return CompressedLayer(name, s.spec, *counts, *errors, slope, timer(old, new.layer), tokens_per_input)


def _check_arguments(
    model: object,
    budget: float,
    families: Sequence[str],
    calibration: Iterable[Batch] | None,
    count: str,
    damping: float,
) -> list[Batch] | None:
    """Raise for arguments that are wrong by themselves, and return the batches."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not a {type(model).__name__}")
    if isinstance(budget, bool) or not isinstance(budget, SupportsFloat):
        raise TypeError(f"budget must be a number, not {budget!r}")
    if calibration is not None and (
        isinstance(calibration, Tensor | Mapping | str) or not isinstance(calibration, Iterable)
    ):
        raise TypeError(
            f"calibration must be an iterable of batches, not a {type(calibration).__name__}: for a single batch give "
            "[batch]"
        )
    if count not in ("params", "macs"):
        raise ValueError(f"count must be 'params' or 'macs', not {count!r}")
    if not 0 <= damping < math.inf:
        raise ValueError(f"damping is a fraction of the inputs' variance, at least 0, such as 0.01, not {damping!r}")
    if not 0 < budget <= 1:
        raise ValueError(f"budget is the fraction of {count} to keep, above 0 and at most 1, not {budget!r}")
    if not families:
        raise ValueError(f"structures is empty: name families, such as {', '.join(DEFAULT_FAMILIES)}")
    batches = None if calibration is None else list(calibration)
    if batches == []:
        raise ValueError("calibration has no batches")
    return batches


def _check_installed(*modules: str) -> None:
    """Raise ModuleNotFoundError at once for packages that are needed only after most of the work."""
    if missing := [module for module in modules if find_spec(module) is None]:
        raise ModuleNotFoundError(
            f"compress needs packages that are not installed ({', '.join(missing)}). Install them with:  "
            "pip install 'einlinear[pretrained]'"
        )
