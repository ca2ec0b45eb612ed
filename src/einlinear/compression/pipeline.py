"""`compress`: a pretrained model whose linear layers become structured ones, within a budget."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import SupportsFloat

import torch
from torch import Tensor, nn

from einlinear import ops
from einlinear.compression.allocation import allocate
from einlinear.compression.cache import Journal, digest_of
from einlinear.compression.calibration import Calibration
from einlinear.compression.candidates import (
    CONSIDERED,
    DEFAULT,
    Candidate,
    Spectrum,
    estimated,
    members,
    probed,
    reason_for_none,
)
from einlinear.compression.compression_report import Compressed, CompressionReport
from einlinear.compression.second_moments import Inputs
from einlinear.compression.select import HEAD, output_layers, select, weight_of
from einlinear.compression.sensitivity import SHARES, Effect
from einlinear.conversion.coverage import measure_coverage
from einlinear.conversion.linear_layers import put, structured_like
from einlinear.nn import Linear
from einlinear.nn.third_party import features
from einlinear.structures import structure
from einlinear_lab.pretrained.running import Batch, evaluating
from einlinear_lab.pretrained.speed import SpeedUp, speed_up

_HARMLESS = [(1.0, 0.0)]  # the effects of a weight of zeros, which has no error
_UNKNOWN = [(1.0, 1.0)]

_UNREACHED = "gets no gradient from the model's output (of several, only the logits or the first one counts)"

Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, of how much


def compress(
    model: nn.Module,
    budget: float,
    structures: Sequence[str] = DEFAULT,
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

    Every layer gets a structure and a rank of its own, or stays dense: what changes the model's outputs least within
    the budget, by the error that each choice leaves at the layer's outputs and by what such an error does to those of
    the model (`effects.py`). With calibration data it is outputs on them that are kept, not weights.

    Args:
        model: any module with `torch.nn.Linear` or transformers' Conv1D layers inside.
        budget: the fraction to keep, above 0 and at most 1, of what `count` says of all the layers' weights together.
        structures: families, whose rank or blocks are chosen per layer ("low_rank", "blast(blocks=4)"), or complete
            structures ("btt(rank=2)").
        calibration: batches that the model is called with: tensors, sequences of positional arguments, or mappings of
            named ones. An "attention_mask" of (batch, tokens) says what is padding. The output that counts is `logits`,
            `last_hidden_state`, or else the first tensor that the model returns, and gradients have to reach it: wrap
            a model that returns several, such as two towers, to return them concatenated, and one that ends in an
            argmax, or runs without gradients, to return logits. None: weights are approximated.
        count: "params" or "macs".
        layers: a glob, or several, on qualified names; None: all but output heads (below).
        sequential: layer after layer, each to do on what the compressed layers before it put out what the original does
            on the original's; False: all on the original's inputs.
        damping: fraction of the mean variance that is added to that of every direction of the inputs, at least 0; what
            rounding asks for is added in any case.
        only_if_faster: a layer becomes only what is at least as fast as the dense one here, for 1 token and for 256
            (within 5 %, by which timings are off); it stays dense where nothing is. The budget may then not be
            reached: the report says so.
        progress: called with what is being done, and how many steps of how many are; for the first time at once.
        folder: for what has been found so far. After an interruption the same call goes on from there. It is not
            removed at the end.
        shared: a folder for the errors of candidates, which are most of the work: compressions of the same model on the
            same data to other budgets, or with other structures, find there what they have in common.

    Returns:
        What became of every layer, and which share of the whole model they are; print it.

    A layer that no structure fits stays dense, and the report says why. So do output heads, unless `layers` names them:

    - the output embeddings of transformers' language models and the last layers of its classifiers;
    - what a model's `get_classifier()` returns, as timm's models have it;
    - the last linear layer of a model if it is, or is in, a part called classifier, fc, head, heads or lm_head;
    - with calibration data, a layer whose outputs are what the model puts out. Exceptions are a plain
      `torch.nn.Sequential`, and a model that puts out as many features as its first layer reads, such as an
      autoencoder: their last layer is compressed.

    Raises:
        TypeError: a model, a budget or calibration data of the wrong type; batches that do not fit the forward pass.
        ValueError: no layer to compress, a budget that nothing reaches, no calibration data, weights or inputs that are
            NaN or infinite (it names the layer), a folder of another compression. The model is then as it was.
        ModuleNotFoundError: scipy is not installed, or with a folder safetensors; the extra `pretrained` has both.

    Example:
        >>> import torch, einlinear as el
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
        >>> report = el.compress(model, 0.5, ["low_rank", "monarch"], calibration=[torch.randn(512, 64)])
        >>> report.params <= 0.5 * report.params_before
        True
    """
    _check_types(model, budget, calibration)
    if count not in ("params", "macs"):
        raise ValueError(f"count must be 'params' or 'macs', not {count!r}")
    if not 0 <= damping < math.inf:
        raise ValueError(f"damping is a fraction of the inputs' variance, at least 0, such as 0.01, not {damping!r}")
    if not 0 < budget <= 1:
        raise ValueError(f"budget is the fraction of {count} to keep, above 0 and at most 1, not {budget!r}")
    families = [structures] if isinstance(structures, str) else list(structures)
    if not families:
        raise ValueError(f"structures is empty: name families, such as {', '.join(DEFAULT)}")
    kept = folder is not None or shared is not None
    _check_installed("scipy", *(("safetensors",) if kept else ()))
    batches = None if calibration is None else list(calibration)
    if batches is not None and not batches:
        raise ValueError("calibration has no batches")
    tell = progress or (lambda what, done, of: None)
    tell("looking at the model", 0, 1)
    with evaluating(model), torch.compiler.set_stance("force_eager"):  # what is compiled already ignores new hooks
        # a copy of the modules, not of their parameters: the original has to go on saying what is right
        compressed = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
        found, skipped = select(model, layers, batches)
        data = Calibration(model, found, batches, partial(tell, "collecting inputs"))
        traced = data.trace()
        called = [name for stage in data.stages for name in stage.names if name in traced.called]
        skipped += [(name, "is never called on the calibration data") for name in found if name not in called]
        names = [name for name in called if name in traced.reached]
        skipped += [(name, _UNREACHED) for name in called if name not in names]
        if layers is None and names:
            heads = output_layers(model, found, called, traced.last)
            skipped += [(name, HEAD) for name in names if name in heads]
            names = [name for name in names if name not in heads]
        coverage = measure_coverage(model, [found[name] for name in names])
        if not names:
            reasons = [f"{name} {reason}" for name, reason in skipped] or ["the model has no linear layer"]
            others = [f"not considered: {', '.join(map(str, coverage.others))}"] if coverage.others else []
            raise ValueError(f"there is no dense linear layer to compress: {'; '.join([*reasons, *others])}")
        if broken := next((name for name in names if not weight_of(found[name]).isfinite().all()), None):
            raise ValueError(f"the weight of {broken} has values that are NaN or infinite")
        unfit = {name: reason_for_none(families, *features(found[name])) for name in names}
        # before anything is written
        _check_budget({name: found[name] for name in names}, budget, count, families, unfit)
        of_all = {"damping": damping, "model and data": digest_of(model, batches) if kept else None}
        settings = {
            **of_all,
            "budget": budget,
            "structures": families,
            "count": count,
            "layers": names,
            "sequential": sequential,
            "only_if_faster": only_if_faster,
        }
        journal = Journal(None if folder is None else Path(folder), settings, "an unfinished compression")
        errors = Journal(None if shared is None else Path(shared), of_all, "errors of candidates")
        tell("looking at the model", 1, 1)
        task = _Task(data, names, families, count, damping, only_if_faster, journal, errors, tell)
        chosen, matters = task.choose(budget)
        changing = {name: candidate.spec for name, candidate in chosen.items() if candidate.spec != "dense"}
        new = task.fit(compressed, changing, sequential and batches is not None)
    left_dense = {name: unfit[name] or task.slow.get(name) for name in names}
    speeds = {name: task.speed_up(name, own.layer) for name, own in new.items()}
    report = [
        _reported(name, found[name], new.get(name), chosen[name], matters[name], speeds.get(name), left_dense[name])
        for name in names
    ]
    dense = sum(layer.params_before for layer in report)
    missed = budget if sum(getattr(layer, count) for layer in report) > budget * dense else None
    put(model, {id(found[name]): own.layer.train(found[name].training) for name, own in new.items()})
    return CompressionReport(tuple(report), tuple(skipped), coverage, missed)


def _check_types(model: object, budget: object, calibration: object) -> None:
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


def _family(spec: str) -> str:
    """What members of a family have in common."""
    return re.sub(r"\d+", "", spec)


def _check_installed(*modules: str) -> None:
    """Raises ModuleNotFoundError for what is needed only when most of the work is done."""
    if missing := [module for module in modules if find_spec(module) is None]:
        raise ModuleNotFoundError(
            f"compress needs packages that are not installed ({', '.join(missing)}). Install them with:  "
            "pip install 'einlinear[pretrained]'"
        )


def _check_budget(
    layers: Mapping[str, nn.Module],
    budget: float,
    count: str,
    families: Sequence[str],
    unfit: Mapping[str, str | None],
) -> None:
    """Raises ValueError if nothing is within the budget, or a family is unknown."""
    dense, least = 0, 0
    for layer in layers.values():
        size = weight_of(layer).numel()
        costs = [getattr(s, count) for family in families for s in members(family, *features(layer), CONSIDERED)]
        dense, least = dense + size, least + min([size, *costs])
    if least > budget * dense:
        why = "".join(f"; {name}: {reason}" for name, reason in unfit.items() if reason is not None)
        raise ValueError(
            f"{budget:g} of the {dense:,} {count} of {len(layers)} layers cannot be reached with "
            f"{', '.join(families)}: these keep {least / dense:.4f} at least{why}"
        )


def _reported(
    name: str,
    old: nn.Module,
    new: _Fitted | None,
    chosen: Candidate,
    matters: float,
    speed: SpeedUp | None,
    reason: str | None,
) -> Compressed:
    dense = weight_of(old).numel()
    if new is None or speed is None:
        return Compressed(name, "dense", dense, dense, dense, chosen.error, 0.0, matters, 1.0, 1.0, reason=reason)
    s = new.layer.structure
    each = new.tokens / s.in_features if new.tokens else None
    return Compressed(
        name, s.spec, dense, s.params, s.macs, chosen.error, new.error, matters, speed.many, speed.one, each
    )


@dataclass(frozen=True)
class _Fitted:
    """A structured layer, the error of its outputs, and how many tokens it was fitted to, 0 of those of its weight."""

    layer: Linear
    error: float
    tokens: int


@dataclass(frozen=True)
class _Task:
    """The layers of one model, and what all of them are compressed by."""

    data: Calibration
    names: Sequence[str]  # of the layers, in the order in which they are called
    families: Sequence[str]
    count: str
    damping: float
    only_if_faster: bool
    journal: Journal
    shared: Journal
    tell: Progress
    speeds: dict[tuple[object, ...], SpeedUp] = field(default_factory=dict)  # of structures at one size
    slow: dict[str, str] = field(default_factory=dict)  # why layers stay dense for which no structure is fast enough

    def choose(self, budget: float) -> tuple[dict[str, Candidate], dict[str, float]]:
        """What every layer is to become, and what a relative error of its outputs counts."""
        names = self.names
        dense = sum(weight_of(self.data.layers[name]).numel() for name in names)
        options: dict[str, list[Candidate]] = {}
        effects: dict[str, Effect] = {}
        for name in names:
            if known := self.journal.read(f"candidates of {name}"):
                effects[name] = Effect.of(known["effects"])
                options[name] = [Candidate(**candidate) for candidate in known["candidates"]]
            elif looked_up := self._looked_up(name):
                effects[name], options[name] = looked_up
        left = [stage for stage in self.data.stages if any(n in names and n not in options for n in stage.names)]
        for name, inputs in self.data.inputs(left):
            if name not in names or name in options:
                continue
            self.tell("comparing structures", len(options), len(names))
            with self._naming(name):
                effects[name] = self._effect(name, inputs)
                options[name] = self._candidates(name, inputs)
            candidates = [asdict(candidate) for candidate in options[name]]
            self.journal.write(f"candidates of {name}", {"effects": effects[name].points, "candidates": candidates})
        self.tell("comparing structures", len(names), len(names))
        if known := self.journal.read("choice"):
            specs: dict[str, str] = known["specs"]
            self.slow.update(known["slow"])
        else:
            weighted = {name: [replace(c, error=effects[name].at(c.error)) for c in options[name]] for name in names}
            specs = {name: c.spec for name, c in self._allocated(weighted, int(budget * dense)).items()}
            self.journal.write("choice", {"specs": specs, "slow": self.slow})
        chosen = {name: next(c for c in options[name] if c.spec == specs[name]) for name in names}
        return chosen, {name: effects[name].slope for name in names}

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """What goes wrong with the numbers of a layer says which layer it was, and what helps."""
        try:
            yield
        except (torch.linalg.LinAlgError, ValueError) as error:  # type: ignore[attr-defined]
            help = f"give more calibration data, or a larger damping than {self.damping:g}"
            raise ValueError(f"{name} cannot be fitted to its inputs: {error}; {help}") from error

    def _allocated(self, options: dict[str, list[Candidate]], budget: int) -> dict[str, Candidate]:
        """What each layer becomes. If only faster layers are wanted, slower candidates are left out one by one."""
        if not self.only_if_faster:
            return allocate(options, budget)
        while True:
            least = sum(min(candidate.cost for candidate in own) for own in options.values())
            chosen = allocate(options, max(budget, least))
            structured = {name: c for name, c in chosen.items() if c.spec != "dense"}
            slow = {
                name: c
                for name, c in structured.items()
                if self.speed_up(name, structured_like(self.data.layers[name], c.spec)).is_slower
            }
            if not slow:
                return chosen
            for name, c in slow.items():
                # richer members of the same family are no faster
                options[name] = [o for o in options[name] if o.cost < c.cost or _family(o.spec) != _family(c.spec)]
                if len(options[name]) == 1:
                    self.slow[name] = "every structure tried is slower than the dense layer"

    def speed_up(self, name: str, new: Linear) -> SpeedUp:
        """How fast a structured layer is beside the dense one of this name: as any of its size."""
        old = self.data.layers[name]
        key = (new.structure.spec, *weight_of(old).shape, old.weight.dtype, old.weight.device, old.bias is None)
        if key not in self.speeds:
            self.tell("timing layers", len(self.speeds), len(self.names))
            self.speeds[key] = speed_up(old, new)
        return self.speeds[key]

    def _effect(self, name: str, inputs: Inputs) -> Effect:
        """What errors of a layer's outputs do: measured, or where there are no data, alike for all weights."""
        layer = self.data.layers[name]
        weight = weight_of(layer)
        if self.data.outputs is None:
            return Effect.of(_UNKNOWN)
        points = self.shared.read(f"effects of {name}")
        if points is None:
            points = []
            for share in SHARES:
                other = torch.zeros_like(weight)
                if rank := int(share * weight.numel() / sum(weight.shape)):
                    s = structure(f"low_rank(rank={rank})", *features(layer))
                    other = ops.dense_weight(s, ops.project(s, weight, inputs.damped(self.damping)))
                shift = None if layer.bias is None else inputs.bias(layer.bias, weight, other) - layer.bias
                if (error := inputs.error(weight, other)) > 0:
                    points.append((error, self.data.outputs.moved(layer, other - weight, shift)))
            if points and not any(effect > 0 for _, effect in points):
                points = _UNKNOWN  # its inputs are zero on all the data: no reason to give the layer up
            self.shared.write(f"effects of {name}", points)
        return Effect.of(points or _HARMLESS)

    def _candidates(self, name: str, inputs: Inputs) -> list[Candidate]:
        """What a layer could become, dense among them."""
        layer = self.data.layers[name]
        weight = weight_of(layer)
        moment = inputs.damped(self.damping)
        spectrum = Spectrum.of(weight, moment)
        self.shared.write(f"spectrum of {name}", asdict(spectrum))
        errors: dict[str, dict[str, float]] = {}
        for family in self.families:
            known = self.shared.read(f"{family} for {name}")
            if known is None:
                known = {
                    s.spec: inputs.error(weight, ops.dense_weight(s, ops.project(s, weight, moment)))
                    for s in probed(list(members(family, *features(layer), CONSIDERED)))
                }
                self.shared.write(f"{family} for {name}", known)
            errors[family] = known
        return self._with_guesses(name, spectrum, errors)

    def _looked_up(self, name: str) -> tuple[Effect, list[Candidate]] | None:
        """The same and the effects, if other compressions have found out all of it: then nothing need be run."""
        points, spectrum = self.shared.read(f"effects of {name}"), self.shared.read(f"spectrum of {name}")
        errors = {family: self.shared.read(f"{family} for {name}") for family in self.families}
        if points is None or spectrum is None or None in errors.values():
            return None
        return Effect.of(points or _HARMLESS), self._with_guesses(name, Spectrum(**spectrum), errors)

    def _with_guesses(
        self, name: str, spectrum: Spectrum, errors: Mapping[str, Mapping[str, float]]
    ) -> list[Candidate]:
        """All members of the families, from those whose errors are known."""
        layer = self.data.layers[name]
        found = [Candidate("dense", weight_of(layer).numel(), 0.0)]
        for family in self.families:
            considered = list(members(family, *features(layer), CONSIDERED))
            guesses = estimated(considered, errors[family], spectrum)
            found += [Candidate(s.spec, getattr(s, self.count), guesses[s.spec]) for s in considered]
        return found

    def fit(self, compressed: nn.Module, chosen: Mapping[str, str], sequential: bool) -> dict[str, _Fitted]:
        """The new layers by name; they are put into a copy of the model."""
        new: dict[str, _Fitted] = {}
        passes = self.data.passes(compressed) if sequential else None
        changing = [stage for stage in self.data.stages if any(name in chosen for name in stage.names)]
        for part in [[stage] for stage in changing] if sequential else [changing]:
            names = [name for stage in part for name in stage.names if name in chosen]
            self.tell("fitting", len(new), len(chosen))
            found = {name: self._known(name, chosen[name]) for name in names}
            new.update({name: known for name, known in found.items() if known is not None})
            left = [stage for stage in part if any(name in names and name not in new for name in stage.names)]
            for name, inputs in self.data.inputs(left, passes):
                if name in names and name not in new:
                    self.tell("fitting", len(new), len(chosen))
                    with self._naming(name):
                        new[name] = self._fitted(name, chosen[name], inputs)
            put(compressed, {id(compressed.get_submodule(name)): new[name].layer for name in names})
        self.tell("fitting", len(chosen), len(chosen))
        return new

    @torch.no_grad()
    def _fitted(self, name: str, spec: str, inputs: Inputs) -> _Fitted:
        """The structured layer in the place of a dense one."""
        old = self.data.layers[name]
        weight = weight_of(old)
        target = inputs.target(weight, self.damping)
        layer = structured_like(old, spec)
        moment = None if inputs.is_white else inputs.damped(self.damping)
        for factor, value in zip(layer.structure.factors, ops.project(layer.structure, target, moment), strict=True):
            layer.get_parameter(factor.name).copy_(value)
        found = layer.dense_weight()
        if layer.bias is not None:
            layer.bias.copy_(inputs.bias(old.bias, weight, found))
        error = inputs.error(weight, found)
        self.journal.write_tensors(f"layer {name}", layer.state_dict())
        self.journal.write(f"fit of {name}", {"error": error, "tokens": inputs.tokens})
        return _Fitted(layer, error, inputs.tokens)

    def _known(self, name: str, spec: str) -> _Fitted | None:
        """The same, if it was found before."""
        tensors, facts = self.journal.read_tensors(f"layer {name}"), self.journal.read(f"fit of {name}")
        if tensors is None or facts is None:
            return None
        layer = structured_like(self.data.layers[name], spec)
        try:
            layer.load_state_dict(tensors)
        except RuntimeError:  # of another structure: the file that had the choice was damaged, and it fell otherwise
            return None
        return _Fitted(layer, **facts)
