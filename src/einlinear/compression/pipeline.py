"""Pipeline of `compress`: calibrate, measure sensitivity, allocate, fit."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, SupportsFloat

import torch
from torch import Tensor, nn

from einlinear.compression.budget import Budget, MacsBudget
from einlinear.compression.byte_budget import ByteBudget, weight_bytes
from einlinear.compression.calibration import Calibration, InputStatistics
from einlinear.compression.candidates import DEFAULT_FAMILIES, LayerCandidate, structure_errors
from einlinear.compression.compression_report import CompressedLayer, CompressionReport
from einlinear.compression.embedding_tables import structured_head
from einlinear.compression.expert_stacks import are_opened, layer_weight, matrices, open_experts
from einlinear.compression.fitting import FittedLayer, fit_layers
from einlinear.compression.forward_passes import Passes
from einlinear.compression.inner_features import InnerFeatures
from einlinear.compression.layer_timing import TOKENS, LayerTimer, SpeedUp
from einlinear.compression.narrowed_config import find_blocks, narrow_attributes
from einlinear.compression.narrowing import UNIFORM, Removal, check_narrow, module_candidates, removal
from einlinear.compression.output_metric import OutputMetric, fit_metric, measure_output_metrics
from einlinear.compression.resume_cache import LayerResults, ResumeCache, check_cache_folders, digest_of
from einlinear.compression.selection import select_layers
from einlinear.compression.sensitivity import UNKNOWN, Sensitivity, SensitivityProbe, measure_sensitivity
from einlinear.compression.spectrum import LowRanks, low_ranks
from einlinear.compression.time_budget import TimeBudget
from einlinear.conversion.replacement import replace_modules, set_config_ties
from einlinear.nn import Embedding, Experts, Linear
from einlinear.nn.dense_layers import features
from einlinear.nn.model_call import Batch, check_batches, evaluating, preserved_rng_state, without_key_cache
from einlinear.nn.quantized_linear import QuantizedLinear

_BUDGETS: dict[str, type[Budget]] = {b.count: b for b in (Budget, MacsBudget, ByteBudget, TimeBudget)}
# tokens for each input feature of a layer, to compare structures with; the one that is chosen is fitted to more
_TOKENS_PER_INPUT_TO_COMPARE = 16


@preserved_rng_state()
def compress(
    model: nn.Module,
    budget: float,
    structures: Sequence[str] = DEFAULT_FAMILIES,
    calibration: Iterable[Batch] | None = None,
    *,
    count: str = "params",
    tokens: int | None = None,
    layers: str | Sequence[str] | None = None,
    embeddings: str | Sequence[str] = (),
    sequential: bool = True,
    damping: float = 1e-2,
    only_if_faster: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    cache_dir: str | Path | None = None,
    shared_cache_dir: str | Path | None = None,
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
            weights are stored in bfloat16, int8, int4, int3 or int2, and a dense weight may keep its dtype. The budget
            is a fraction of the bytes that the weights take in the model's dtype. With "time", it is a fraction of the
            seconds that the dense layers take on this machine; layers that would not become faster stay dense.
        tokens: tokens that a layer gets in one call, for which layers are timed: 1 for decoding, or the batch size
            times the length. None: 1 and 256; count="time" needs a number.
        layers: a glob, or several, on qualified names: which layers to compress. None: all but output heads, which the
            guide lists; () with `embeddings`: none. Globs and names are those of `einlinear.convert`.
        embeddings: a glob, or several: which `torch.nn.Embedding` to compress as well, with count="params". The rows of
            tokens that are frequent in the calibration data count most. An output head with the weight of one gets its
            factors; the config of a transformers model is then told not to tie the two.
        sequential: fit each layer on the outputs of the compressed layers before it; False: on the original's inputs,
            as stacked experts always are.
        damping: fraction of the mean variance to add to the variance of every direction of the inputs, at least 0.
        only_if_faster: use only structures that are as fast as the dense layer on this machine, for all `tokens`,
            within 5 %, even if the budget is then not reached. Ignored with count="time".
        progress: called with the current step, and how much of it is done, of how much; for the first time at once.
        cache_dir: folder of a resume cache, from which the same call resumes after an interruption. It is not removed
            at the end.
        shared_cache_dir: the same for compressions of the same model and data to other budgets or structures.

    Returns:
        A report to print: every layer, and their share of the whole model.

    Raises:
        TypeError: a model, a budget or calibration data of the wrong type; batches that the forward pass does not take.
        ValueError: no layer to compress, a budget that nothing reaches, no calibration data, weights or inputs that are
            not finite, the cache of another compression. The model is then unchanged.
        ModuleNotFoundError: scipy is not installed, or with a cache safetensors; the extra `pretrained` has both.

    Example:
        >>> import torch, einlinear as el
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
        >>> report = el.compress(model, 0.5, ["low_rank", "monarch"], calibration=[torch.randn(512, 64)])
        >>> report.params <= 0.5 * report.params_before
        True
    """
    families = [structures] if isinstance(structures, str) else list(structures)
    kind = budget_kind(count, families, tokens, only_if_faster, embeddings)
    _check_arguments(model, budget, families, calibration, count, damping)
    batches = None if calibration is None else list(calibration)
    if batches == []:
        raise ValueError("calibration has no batches")
    is_cached = cache_dir is not None or shared_cache_dir is not None
    check_cache_folders(cache_dir, shared_cache_dir)
    _check_packages(is_cached)
    report_progress = progress or (lambda step, done, of: None)
    report_progress("looking at the model", 0, 1)
    data_config = {"damping": damping, "model and data": digest_of(model, batches) if is_cached else None}
    with open_experts(model, are_opened(count, families, only_if_faster)):
        # compiled code ignores new hooks
        with evaluating(model), without_key_cache(model), torch.compiler.set_stance("force_eager"):
            # copies the modules and shares their tensors: the original stays the reference
            compressed = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
            selection = select_layers(model, layers, batches, embeddings)
            dense = selection.layers
            linear = selection.linear()
            blocks, not_narrowed = find_blocks(model, linear, batches or [], families)
            config = {"budget": budget, "structures": families, "count": count, "layers": list(dense)}
            config |= {"sequential": sequential, "only_if_faster": only_if_faster, "tokens": tokens, **data_config}
            results = shared_results = ResumeCache(cache_dir, config, "an unfinished compression")
            if shared_cache_dir is not None:
                shared_results = ResumeCache(shared_cache_dir, data_config, "errors of candidates")

            def report_timing(done: int) -> None:
                report_progress("timing layers", done, max(done, len(dense)))

            timer = LayerTimer(linear.layers, TOKENS if tokens is None else (tokens,), results, report_timing)
            report_progress("looking at the model", 1, 1)
            total_budget = kind(budget, dense, families, timer, only_if_faster)
            total_budget.measure_costs()
            if not blocks:
                total_budget.check()

            # 1. prepare the calibration: steps 2 and 4 collect the inputs of each stage when they need them
            read = [stage.names[0] for stage in selection.stages]
            originals = None if batches is None else Passes(model, batches, unchanged=read, copy=results.copy)
            calibrated = Calibration(originals, selection, partial(report_progress, "collecting inputs"))

            # 2. measure the sensitivity to each layer, and the errors of its candidates
            probe = None if batches is None else SensitivityProbe(model, batches, selection.tied_heads)
            metrics = cache(
                lambda: {} if batches is None else measure_output_metrics(model, linear.layers, batches, results.copy)
            )

            def find_metric(name: str) -> OutputMetric | None:
                return metrics().get(name)

            compare = LayerResults("comparing structures", len(dense), damping, shared_results, report_progress)
            measured = _measure_layers(compare, calibrated, total_budget, probe, find_metric, blocks)
            sensitivities, candidates, removals = measured
            modules = module_candidates(blocks, dense, removals, candidates, sensitivities, UNIFORM in families)

            # 3. allocate the budget
            chosen, slow = total_budget.allocate(candidates, modules, results)
            alternatives = total_budget.alternatives(candidates, chosen, sensitivities)

            # 4. fit
            new = {name: candidate for name, candidate in chosen.items() if candidate.label != "dense"}
            passes = Passes(compressed, batches, copy=results.copy) if sequential and batches is not None else None
            fit = LayerResults("fitting", len(new), damping, results, report_progress)
            fitted = fit_layers(fit, calibrated, new, find_metric, compressed, passes)

        # 5. replace the layers of the model
        reasons = total_budget.reasons | dict.fromkeys(slow, "every structure tried is slower than the dense layer")
        names = selection.names
        reports = [
            _layer_report(names[n], layer, chosen[n], sensitivities[n], fitted.get(n), timer, reasons.get(n))
            for n, layer in dense.items()
        ]
        is_missed = sum(candidate.cost for candidate in chosen.values()) > total_budget.largest
        narrow_attributes(model, chosen)
        new_layers = {id(dense[name]): f.layer.train(dense[name].training) for name, f in fitted.items()}
        tied_heads = {name: head for name, head in selection.tied_heads.items() if name in fitted}
        for name, full_name in tied_heads.items():
            head = model.get_submodule(full_name)
            new_layers[id(head)] = structured_head(fitted[name].layer, head)
            set_config_ties(model, False)
        replace_modules(model, new_layers)
        return CompressionReport(
            tuple(reports),
            tuple(selection.skipped),
            selection.coverage,
            count=count,
            missed_budget=budget if is_missed else None,
            tied=tuple((names[name], names[head]) for name, head in tied_heads.items()),
            not_narrowed=tuple((names[name], reason) for name, reason in not_narrowed),
            **alternatives,
        )


class _Measurements(NamedTuple):
    """Sensitivities of the model's output, candidates with their errors, and removals of inner features, by layer."""

    sensitivities: dict[str, Sensitivity]
    candidates: dict[str, list[LayerCandidate]]
    removals: dict[str, Removal]


def _measure_layers(
    results: LayerResults,
    calibrated: Calibration,
    budget: Budget,
    probe: SensitivityProbe | None,
    find_metric: Callable[[str], OutputMetric | None],
    blocks: Sequence[InnerFeatures],
) -> _Measurements:
    sensitivities, candidates, removals = measured = _Measurements(dict.fromkeys(calibrated.layers, UNKNOWN), {}, {})
    consumers = {inner.consumer: inner for inner in blocks}
    for name, statistics in calibrated.statistics(calibrated.stages, tokens_per_input=_TOKENS_PER_INPUT_TO_COMPARE):
        layer, cached = calibrated.layers[name], results.cached(name, len(candidates), statistics)
        get_metric = partial(find_metric, name)
        components = _components(layer, get_metric)
        if probe is not None:
            measure = partial(measure_sensitivity, layer, probe, components)
            sensitivities[name] = cached("sensitivity", measure, Sensitivity.of)
        errors = structure_errors(layer, budget.members[name], get_metric, components, cached)
        candidates[name] = budget.candidates(name, errors, sensitivities[name], cached)
        if name in consumers:
            removals[name] = cached("inner features", partial(removal, layer, consumers[name]), Removal.from_record)
    results.report(len(candidates))
    return measured


def _components(
    layer: Any, get_metric: Callable[[], OutputMetric | None]
) -> Callable[[InputStatistics, Tensor], LowRanks]:
    """Return a function that computes the low ranks of a layer once, since a layer has one second moment."""
    result: LowRanks | None = None

    def compute(statistics: InputStatistics, moment: Tensor) -> LowRanks:
        nonlocal result
        if result is None:
            metric = fit_metric(statistics, get_metric)
            result = low_ranks(layer_weight(layer), moment, metric, statistics.frequencies)
        return result

    return compute


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
    entries, before = dense.weight.numel(), weight_bytes(dense)
    is_table = isinstance(dense, nn.Embedding)
    # a lookup multiplies little
    macs_before = 0 if is_table else matrices(dense, "macs") * math.prod(features(dense))
    params, macs, now = entries, macs_before, before
    speed_up = SpeedUp(dict.fromkeys(timer.tokens, 1.0))
    if fitted is not None:
        new = fitted.layer
        if isinstance(new, Linear | Experts | Embedding):
            params, macs = (matrices(dense, count) * getattr(new.structure, count) for count in ("params", "macs"))
            macs = 0 if is_table else macs
        else:
            params = macs = new.weight.numel()
        now = new.nbytes if isinstance(new, QuantizedLinear) else params * dense.weight.element_size()
        is_timed = not isinstance(new, Experts | Embedding)
        speed_up = timer(dense, new) if is_timed else SpeedUp(dict.fromkeys(timer.tokens, math.nan))
    return CompressedLayer(
        name,
        chosen.structure,
        params_before=entries,
        params=params,
        macs_before=macs_before,
        macs=macs,
        expected_error=chosen.error,
        error=fitted.error if fitted else 0.0,
        sensitivity=sensitivity.slope,
        speed_up=speed_up,
        tokens_per_input=fitted.tokens / features(dense)[0] if fitted and fitted.tokens and not is_table else None,
        reason=None if fitted else reason,
        precision=chosen.precision,
        bytes_before=before,
        bytes=now,
    )


def budget_kind(
    count: str, families: Sequence[str], tokens: int | None, only_if_faster: bool, embeddings: str | Sequence[str]
) -> type[Budget]:
    """Return the kind of budget that `count` names; ValueError for options of `compress` that do not go with it."""
    if count not in _BUDGETS:
        raise ValueError(f"count must be one of {', '.join(map(repr, _BUDGETS))}, not {count!r}")
    if tokens is not None and (not isinstance(tokens, int) or tokens < 1):
        raise ValueError(f"tokens is the number in one call of a layer, at least 1, not {tokens!r}")
    check_narrow(families)
    _BUDGETS[count].check_options(families, tokens, only_if_faster)
    if embeddings and count != "params":
        reason = "a lookup multiplies little, and rows are not quantised"
        raise ValueError(f"embeddings are compressed with count='params' only, not {count!r}: {reason}")
    return _BUDGETS[count]


def _check_arguments(
    model: object, budget: float, families: Sequence[str], calibration: Any, count: str, damping: float
) -> None:
    """Raise for arguments that are wrong by themselves."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not a {type(model).__name__}")
    if isinstance(budget, bool) or not isinstance(budget, SupportsFloat):
        raise TypeError(f"budget must be a number, not {budget!r}")
    if calibration is not None:
        check_batches(calibration, "calibration")
    if not 0 <= damping < math.inf:
        raise ValueError(f"damping is a fraction of the inputs' variance, at least 0, such as 0.01, not {damping!r}")
    if not 0 < budget <= 1:
        raise ValueError(f"budget is the fraction of {count} to keep, above 0 and at most 1, not {budget!r}")
    if not families:
        raise ValueError(f"structures is empty: name families, such as {', '.join(DEFAULT_FAMILIES)}")


def _check_packages(is_cached: bool) -> None:
    required = ("scipy", "safetensors") if is_cached else ("scipy",)
    if missing := [package for package in required if find_spec(package) is None]:
        advice = "Install them with:  pip install 'einlinear[pretrained]'"
        raise ModuleNotFoundError(f"compress needs packages that are not installed ({', '.join(missing)}). {advice}")
