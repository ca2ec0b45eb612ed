"""Pipeline of `compress`: calibrate, measure sensitivity, allocate, fit."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, SupportsFloat

import torch
from torch import Tensor, nn

from einlinear.compression.allocation import allocate, allocate_faster, least_cost
from einlinear.compression.calibration import Calibration, InputStatistics
from einlinear.compression.candidates import DEFAULT_FAMILIES, LayerCandidate, layer_candidates, members_by_layer
from einlinear.compression.compression_report import CompressedLayer, CompressionReport, RoundingAlone
from einlinear.compression.expert_stacks import DenseStack, dense_cost, layer_weight, matrices, open_experts
from einlinear.compression.factor_rounding import round_factors
from einlinear.compression.forward_passes import Passes
from einlinear.compression.inner_features import InnerFeatures
from einlinear.compression.layer_timing import TOKENS, LayerTimer, SpeedUp
from einlinear.compression.narrowed_config import find_blocks, narrow_attributes
from einlinear.compression.narrowing import (
    NARROW,
    UNIFORM,
    ModuleCandidate,
    NarrowCandidate,
    Removal,
    check_narrow,
    fit_narrow,
    in_full_size,
    module_candidates,
    narrow_layer,
    removal,
)
from einlinear.compression.output_metric import OutputMetric, measure_output_metrics, project
from einlinear.compression.precision_candidates import in_every_precision, least_bytes, weight_bytes
from einlinear.compression.resume_cache import ResumeCache, digest_of
from einlinear.compression.selection import select_layers
from einlinear.compression.sensitivity import UNKNOWN, Sensitivity, SensitivityProbe, measure_sensitivity
from einlinear.compression.spectrum import LowRanks, low_ranks
from einlinear.compression.time_candidates import LayerTimes
from einlinear.conversion.replacement import replace_modules, structured_like
from einlinear.nn import Experts, Linear
from einlinear.nn.dense_layers import features
from einlinear.nn.model_call import Batch, check_batches, evaluating
from einlinear.nn.quantized_linear import QuantizedLinear
from einlinear.structures import Structure

# tokens for each input feature of a layer, to compare structures with; the one that is chosen is fitted to more
_ENOUGH = 16


def compress(
    model: nn.Module,
    budget: float,
    structures: Sequence[str] = DEFAULT_FAMILIES,
    calibration: Iterable[Batch] | None = None,
    *,
    count: str = "params",
    tokens: int | None = None,
    layers: str | Sequence[str] | None = None,
    sequential: bool = True,
    damping: float = 1e-2,
    only_if_faster: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    folder: str | Path | None = None,
    shared: str | Path | None = None,
) -> CompressionReport:
    """Replace linear layers by structured ones that together keep a share of parameters, MACs, bytes or time, in place.

    Each layer gets its own structure and rank, or stays dense, so that the model's output changes least.

    Args:
        model: any module with `torch.nn.Linear`, transformers' Conv1D layers or its stacked experts inside.
        budget: the fraction to keep, above 0 and at most 1, of what `count` says of all the layers' weights together.
        structures: families, whose rank or blocks are chosen per layer ("low_rank", "blast(blocks=4)"), or complete
            structures ("btt(rank=2)"). "narrow" removes hidden features of feed-forward blocks and heads of attention,
            and leaves plain dense layers; "narrow(uniform=True)" removes the same number in all blocks of a kind.
        calibration: batches: tensors, sequences of positional arguments, or mappings of named ones. An "attention_mask"
            of (batch, tokens) marks padding. The output that counts is `logits`, `last_hidden_state`, or else the first
            tensor that the model returns, through which gradients pass. None: weights are approximated, not outputs.
        count: "params", "macs", "bytes" or "time". With "bytes", structure and precision are chosen together:
            structured and dense weights in their own dtype, bfloat16, int8, int4, int3 or int2. The budget is a
            fraction of the bytes that the weights take in the model's dtype. With "time", it is a fraction of the
            seconds that the dense layers take on this machine; layers that would not become faster stay dense.
        tokens: tokens that a layer gets in one call, for which layers are timed: 1 for decoding, or the batch size
            times the length. None: 1 and 256; count="time" needs a number.
        layers: a glob, or several, on qualified names; None: all but output heads, which the guide lists.
        sequential: fit each layer on the outputs of the compressed layers before it; False: on the original's inputs,
            as stacked experts always are.
        damping: fraction of the mean variance to add to the variance of every direction of the inputs, at least 0.
        only_if_faster: use only structures that are as fast as the dense layer on this machine, for all `tokens`,
            within 5 %, even if the budget is then not reached.
        progress: called with the current step, and how much of it is done, of how much; for the first time at once.
        folder: resume cache, from which the same call resumes after an interruption. It is not removed at the end.
        shared: resume cache for compressions of the same model and data to other budgets or with other structures.

    Returns:
        A report to print: every layer, and their share of the whole model.

    Raises:
        TypeError: a model, a budget or calibration data of the wrong type; batches that the forward pass does not take.
        ValueError: no layer to compress, a budget that nothing reaches, no calibration data, weights or inputs that are
            not finite, a folder of another compression. The model is then unchanged.
        ModuleNotFoundError: scipy is not installed, or with a folder safetensors; the extra `pretrained` has both.

    Example:
        >>> import torch, einlinear as el
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
        >>> report = el.compress(model, 0.5, ["low_rank", "monarch"], calibration=[torch.randn(512, 64)])
        >>> report.params <= 0.5 * report.params_before
        True
    """
    families = [structures] if isinstance(structures, str) else list(structures)
    batches = _check_arguments(model, budget, families, calibration, count, tokens, damping)
    if only_if_faster and count == "bytes":
        raise ValueError("only_if_faster=True needs count='params', 'macs' or 'time': with 'bytes' nothing is timed")
    check_narrow(families)
    is_cached = folder is not None or shared is not None
    _check_packages(is_cached)
    report_progress = progress or (lambda step, done, of: None)
    report_progress("looking at the model", 0, 1)
    # compiled code ignores new hooks
    of_size = count in ("params", "macs") and not only_if_faster and {NARROW, UNIFORM}.isdisjoint(families)
    with open_experts(model, of_size):
        with evaluating(model), torch.compiler.set_stance("force_eager"):
            # copies the modules and shares their tensors: the original stays the reference
            compressed = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
            selection = select_layers(model, layers, batches)
            dense = selection.layers
            linears = {name: layer for name, layer in dense.items() if not isinstance(layer, DenseStack)}
            in_bytes = count == "bytes"
            largest = budget * sum(weight_bytes(l) if in_bytes else dense_cost(l, count) for l in dense.values())
            blocks, not_narrowed = find_blocks(model, selection, batches or [], families)
            alone = [family for family in families if family not in (NARROW, UNIFORM)]
            # structure need not save anything where time, precision or fewer features do
            by_size = (budget, count) if count in ("params", "macs") and not blocks else (1.0, "params")
            members, reasons = members_by_layer(dense, alone, *by_size)
            if in_bytes or not alone:
                reasons = {}
            if in_bytes and not blocks:
                _check_bytes(dense, members, budget, int(largest))
            data_config = {"damping": damping, "model and data": digest_of(model, batches) if is_cached else None}
            config = {"budget": budget, "structures": families, "count": count, "layers": list(dense)}
            config |= {"sequential": sequential, "only_if_faster": only_if_faster, "tokens": tokens, **data_config}
            results = ResumeCache(folder, config, "an unfinished compression")
            shared_cache = results if shared is None else ResumeCache(shared, data_config, "errors of candidates")
            timed = TOKENS if tokens is None else (tokens,)

            def report_timing(done: int) -> None:
                report_progress("timing layers", done, max(done, len(dense)))

            timer = LayerTimer(linears, timed, results, report_timing)
            report_progress("looking at the model", 1, 1)
            times = LayerTimes(timer, dense, members, budget) if count == "time" else None

            # 1. calibrate
            passes = None if batches is None else Passes(model, batches, unchanged=selection.first_layers)
            calibrated = Calibration(passes, selection, partial(report_progress, "collecting inputs"))

            # 2. measure the sensitivity to each layer, and the errors of its candidates
            probe = None if batches is None else SensitivityProbe(model, batches)
            metrics = cache(lambda: {} if batches is None else measure_output_metrics(model, linears, batches))
            compare = _Step("comparing structures", len(dense), damping, shared_cache, report_progress)
            sensitivities, candidates, removals = _compare(compare, calibrated, members, count, probe, metrics, blocks)
            modules = module_candidates(blocks, dense, removals, candidates, sensitivities, UNIFORM in families)
            if blocks and (least_possible := least_cost(candidates, modules)) > largest:
                share = f"{budget:g} of the {count} of {len(dense)} layers, {int(largest):,}, cannot be reached"
                raise ValueError(f"{share} with {', '.join(families)}: the cheapest choice takes {least_possible:,}")

            # 3. allocate
            if times is None:
                timed_layers = timer if only_if_faster else None
                chosen, slow = _allocate(results, candidates, modules, int(largest), dense, timed_layers)
            else:
                chosen, slow = times.allocate(candidates)
            alternative = _rounding_alone(candidates, chosen, int(largest)) if in_bytes else None
            reasons |= dict.fromkeys(slow, "every structure tried is slower than the dense layer")

            # 4. fit
            specs = {name: candidate for name, candidate in chosen.items() if candidate.label != "dense"}
            passes = Passes(compressed, batches) if sequential and batches is not None else None
            fit = _Step("fitting", len(specs), damping, results, report_progress)
            fitted = _fit(fit, calibrated, specs, metrics, compressed, passes)

        # 5. replace the layers of the model
        reports = [
            _layer_report(name, layer, chosen[name], sensitivities[name], fitted.get(name), timer, reasons.get(name))
            for name, layer in dense.items()
        ]
        missed = sum(choice.cost for choice in chosen.values()) > (largest if times is None else times.budget)
        narrow_attributes(model, chosen)
        replace_modules(model, {id(dense[name]): new.layer.train(dense[name].training) for name, new in fitted.items()})
        return CompressionReport(
            tuple(reports),
            tuple(selection.skipped),
            selection.coverage,
            missed_budget=budget if missed else None,
            alternative=alternative,
            time=None if times is None else times.measured(chosen, sensitivities),
            not_narrowed=tuple(not_narrowed),
        )


def _layer_report(
    name: str,
    dense: Any,
    chosen: LayerCandidate,
    sensitivity: Sensitivity,
    fitted: FittedLayer | None,
    timer: LayerTimer,
    reason: str | None,
) -> CompressedLayer:
    """Describe what became of a dense layer; `fitted` is None if it stays dense."""
    size, before = dense.weight.numel(), weight_bytes(dense)
    report = CompressedLayer(
        name,
        "dense",
        params_before=size,
        params=size,
        macs=dense_cost(dense, "macs"),
        expected_error=chosen.error,
        error=0.0,
        sensitivity=sensitivity.slope,
        speed_up=SpeedUp(dict.fromkeys(timer.tokens, 1.0)),
        reason=reason,
        bytes_before=before,
        bytes=before,
    )
    if fitted is None:
        return report
    new = fitted.layer
    is_structured, of = isinstance(new, Linear | Experts), partial(matrices, dense)
    params = of("params") * new.structure.params if is_structured else new.weight.numel()
    is_stack = isinstance(dense, DenseStack)
    return replace(
        report,
        structure=chosen.structure,
        params=params,
        macs=of("macs") * new.structure.macs if is_structured else params,
        error=fitted.error,
        # experts are not timed
        speed_up=SpeedUp(dict.fromkeys(timer.tokens, math.nan)) if is_stack else timer(dense, new),
        tokens_per_input=fitted.tokens / features(dense)[0] if fitted.tokens else None,
        reason=None,
        precision=chosen.precision,
        bytes=new.nbytes if isinstance(new, QuantizedLinear) else params * dense.weight.element_size(),
    )


class FittedLayer(NamedTuple):
    """A structured or narrow layer, its relative squared error, and the number of tokens that it was fitted to."""

    layer: Any
    error: float
    tokens: int


@dataclass(frozen=True)
class _Step:
    """A step of the pipeline that computes results layer by layer, from the inputs of each."""

    name: str
    layers: int
    damping: float
    cache: ResumeCache
    progress: Callable[[str, int, int], None]

    def cached(self, layer: str, done: int, collect: Callable[[], InputStatistics]) -> Callable[..., Any]:
        """Return `ResumeCache.get_or` for functions of a layer's inputs and their damped second moment."""

        def get_or(content: str, compute: Callable[[InputStatistics, Tensor], Any], *how: Any) -> Any:
            def record() -> Any:
                inputs = collect()
                self.report(done)
                try:
                    return compute(inputs, inputs.damped(self.damping))
                except (torch.linalg.LinAlgError, ValueError) as error:  # type: ignore[attr-defined]
                    advice = f"give more calibration data, or a larger damping than {self.damping:g}"
                    raise ValueError(f"{layer} cannot be fitted to its inputs: {error}; {advice}") from error

            return self.cache.get_or(f"{content} of {layer}", record, *how)

        return get_or

    def report(self, done: int) -> None:
        self.progress(self.name, done, self.layers)


def _compare(
    step: _Step,
    calibrated: Calibration,
    members: Mapping[str, dict[str, list[Structure]]],
    count: str,
    probe: SensitivityProbe | None,
    metrics: Callable[[], dict[str, OutputMetric]],
    blocks: Sequence[InnerFeatures],
) -> tuple[dict[str, Sensitivity], dict[str, list[LayerCandidate]], dict[str, Removal]]:
    """Return the sensitivity of the model's output to each layer, candidates with their errors, and those of blocks."""
    sensitivities = dict.fromkeys(calibrated.layers, UNKNOWN)
    candidates: dict[str, list[LayerCandidate]] = {}
    consumers, removals = {inner.consumer: inner for inner in blocks}, dict[str, Removal]()
    for name, statistics in calibrated.statistics(calibrated.stages, enough=_ENOUGH):
        layer, cached = calibrated.layers[name], step.cached(name, len(candidates), statistics)
        metric = partial(_metric, metrics, name)
        components = _components(layer, metric)
        if probe is not None:
            measure = partial(measure_sensitivity, layer, probe, components)
            sensitivities[name] = cached("sensitivity", measure, Sensitivity.of)
        by_structure = "macs" if count == "macs" else "params"
        given = layer, members[name], by_structure, sensitivities[name], metric, components, cached
        candidates[name] = layer_candidates(*given)
        if count == "bytes":
            candidates[name] = in_every_precision(layer, candidates[name], sensitivities[name], cached)
        if name in consumers:
            removals[name] = cached("inner features", partial(removal, layer, consumers[name]), Removal.from_record)
    step.report(len(candidates))
    return sensitivities, candidates, removals


def _components(layer: Any, metric: Callable[[], OutputMetric | None]) -> Callable[[Tensor], LowRanks]:
    """Return a function that computes the low ranks of a layer once, since a layer has one second moment."""
    results: list[LowRanks] = []

    def compute(moment: Tensor) -> LowRanks:
        if not results:
            results.append(low_ranks(layer_weight(layer), moment, metric()))
        return results[0]

    return compute


def _allocate(
    cache: ResumeCache,
    candidates: Mapping[str, Sequence[LayerCandidate]],
    modules: Sequence[ModuleCandidate],
    budget: int,
    layers: Mapping[str, Any],
    timer: LayerTimer | None,
) -> tuple[dict[str, LayerCandidate], list[str]]:
    """Return a candidate for every layer, and the layers whose structures are all slower than dense, with a timer."""

    def is_slower(name: str, spec: str) -> bool:
        return timer is not None and timer(layers[name], structured_like(layers[name], spec)).is_slower

    def choose() -> dict[str, Any]:
        chosen, slow = allocate_faster(candidates, budget, is_slower, modules)
        return {"structures": {name: candidate.label for name, candidate in chosen.items()}, "slow": slow}

    def decode(record: Any) -> tuple[dict[str, LayerCandidate], list[str]]:
        specs = record["structures"]
        options = {name: [*candidates[name], *(m[name] for m in modules if name in m)] for name in layers}
        return {name: {c.label: c for c in options[name]}[specs[name]] for name in layers}, list(record["slow"])

    return cache.get_or("allocation", choose, decode)


def _rounding_alone(
    candidates: Mapping[str, Sequence[LayerCandidate]], chosen: Mapping[str, LayerCandidate], budget: int
) -> RoundingAlone:
    dense = {name: [c for c in options if c.spec == "dense"] for name, options in candidates.items()}
    rounding = None
    if sum(min(c.cost for c in options) for options in dense.values()) <= budget:
        rounding = sum(c.output_change for c in allocate(dense, budget).values())
    return RoundingAlone(sum(c.output_change for c in chosen.values()), rounding)


def _fit(
    step: _Step,
    calibrated: Calibration,
    specs: Mapping[str, LayerCandidate],
    metrics: Callable[[], dict[str, OutputMetric]],
    compressed: nn.Module,
    passes: Passes | None,
) -> dict[str, FittedLayer]:
    """Fit a layer of each structure, by name, and put it into the compressed model, of which these are passes."""
    fitted: dict[str, FittedLayer] = {}
    stages = [stage for stage in calibrated.stages if not specs.keys().isdisjoint(stage.names)]
    # with passes each layer is fitted to the outputs of those before it, which are compressed already
    for group in [stages] if passes is None else [[stage] for stage in stages]:
        for name, statistics in calibrated.statistics(group, passes):
            if name in specs:
                old, choice, cached = calibrated.layers[name], specs[name], step.cached(name, len(fitted), statistics)
                compute = partial(_fit_layer, old, choice, step.damping, partial(_metric, metrics, name))
                decode = partial(_fitted_layer, old, choice)
                fitted[name] = cached(choice.label, compute, decode, True)
        names = [name for stage in group for name in stage.names if name in fitted]
        new = {name: in_full_size(calibrated.layers[name], fitted[name].layer, specs[name]) for name in names}
        replace_modules(compressed, {id(compressed.get_submodule(name)): layer for name, layer in new.items()})
    step.report(len(fitted))
    return fitted


def _metric(metrics: Callable[[], dict[str, OutputMetric]], name: str) -> OutputMetric | None:
    return metrics().get(name)


@torch.no_grad()
def _fit_layer(
    old: Any,
    choice: LayerCandidate,
    damping: float,
    metric: Callable[[], OutputMetric | None],
    inputs: InputStatistics,
    moment: Tensor,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a structured layer whose outputs come closest to a dense one's, and how close."""
    if isinstance(choice, NarrowCandidate):
        return fit_narrow(old, choice, damping, inputs, moment)
    weight, layer = layer_weight(old), _layer_of(old, choice)
    target, of_inputs = inputs.target_weight(weight, damping), moment if inputs.tokens else None
    factors = [target] if choice.spec == "dense" else project(layer.structure, target, of_inputs, metric())
    if isinstance(layer, QuantizedLinear):
        layer.store(round_factors(layer.structure, factors, layer.formats, target, of_inputs))
    else:
        for factor, value in zip(layer.structure.factors, factors, strict=True):
            layer.get_parameter(factor.name).copy_(value)
    approximation = layer.dense_weights() if isinstance(layer, Experts) else layer.dense_weight()
    if layer.bias is not None:
        layer.bias.copy_(inputs.corrected_bias(old.bias, weight, approximation))
    return layer.state_dict(), {"error": inputs.relative_error(weight, approximation), "tokens": inputs.tokens}


def _layer_of(old: Any, choice: LayerCandidate) -> Any:
    if isinstance(choice, NarrowCandidate):
        return narrow_layer(old, choice)
    if isinstance(old, DenseStack):
        return old.structured(choice.spec)
    if not choice.precision:
        return structured_like(old, choice.spec)
    config: dict[str, Any] = {"device": old.weight.device, "dtype": old.weight.dtype, "precision": choice.precision}
    layer = QuantizedLinear(*features(old), choice.spec, old.bias is not None, **config)
    layer.dense_class = type(old)
    if layer.bias is not None:
        layer.bias.requires_grad_(old.bias.requires_grad)
    return layer


def _fitted_layer(old: Any, choice: LayerCandidate, record: tuple[dict[str, Tensor], dict[str, Any]]) -> FittedLayer:
    tensors, metadata = record
    layer = _layer_of(old, choice)
    layer.load_state_dict(tensors)
    return FittedLayer(layer, float(metadata["error"]), int(metadata["tokens"]))


def _check_arguments(
    model: object,
    budget: float,
    families: Sequence[str],
    calibration: Any,
    count: str,
    tokens: int | None,
    damping: float,
) -> list[Batch] | None:
    """Raise for arguments that are wrong by themselves, and return the batches."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not a {type(model).__name__}")
    if isinstance(budget, bool) or not isinstance(budget, SupportsFloat):
        raise TypeError(f"budget must be a number, not {budget!r}")
    if calibration is not None:
        check_batches(calibration, "calibration")
    if count not in ("params", "macs", "bytes", "time"):
        raise ValueError(f"count must be 'params', 'macs', 'bytes' or 'time', not {count!r}")
    if tokens is None and count == "time":
        raise ValueError("count='time' needs tokens: the number in one call, such as 1 for decoding, or 32 * 64")
    if count == "time" and not {NARROW, UNIFORM}.isdisjoint(families):
        raise ValueError("'narrow' has no budget of time: give count='params', 'macs' or 'bytes'")
    if tokens is not None and (not isinstance(tokens, int) or tokens < 1):
        raise ValueError(f"tokens is the number in one call of a layer, at least 1, not {tokens!r}")
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


def _check_bytes(
    layers: Mapping[str, Any], members: Mapping[str, dict[str, list[Structure]]], budget: float, largest: int
) -> None:
    least = sum(
        least_bytes(layer, [s for group in members[name].values() for s in group]) for name, layer in layers.items()
    )
    if least > largest:
        share = f"{budget:g} of the bytes of {len(layers)} layers, {largest:,}, cannot be reached"
        raise ValueError(f"{share}: with the smallest structures in the lowest precision they take {least:,}")


def _check_packages(is_cached: bool) -> None:
    required = ("scipy", "safetensors") if is_cached else ("scipy",)
    if missing := [package for package in required if find_spec(package) is None]:
        advice = "Install them with:  pip install 'einlinear[pretrained]'"
        raise ModuleNotFoundError(f"compress needs packages that are not installed ({', '.join(missing)}). {advice}")
