"""The search: candidates one after another, each trained within the same budget, until there are enough."""

from __future__ import annotations

import math
import random
import time
from collections import defaultdict, deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from statistics import fmean
from typing import Any

import optuna
from optuna.trial import TrialState

from einlinear.structures import DoesNotFit
from einlinear_lab.runs.options import parse
from einlinear_lab.runs.records import METRICS, Result, read_record
from einlinear_lab.runs.run import Run
from einlinear_lab.runs.store import Store
from einlinear_lab.search.matching import Matching, at
from einlinear_lab.search.predictor import AT_LEAST, Predictor, Trust, foretold
from einlinear_lab.search.settings import Settings
from einlinear_lab.search.space import STRUCTURE, Space, option_of
from einlinear_lab.search.study import SAME_AS, WHY, Candidate, Tried, kind_of_storage, open_study
from einlinear_lab.sweeps.attempts import stop
from einlinear_lab.sweeps.driver import Event, Job, Pool
from einlinear_lab.training import metrics

SAMPLERS = ("predictor", "tpe", "random")
_HEADS = 4  # of a gpt whose heads are not set, of any size: a width has to be a multiple of them
_POOL = 64  # candidates that the predictor chooses from
_LEAST_TRUST = 0.2  # how often the predictor chooses, even if it is good for nothing
_DRAWN = 20  # structures, one of which has to have a model of the budget
_VAIN = 200  # proposals in a row that fit no budget or were tried before: there is nothing left
_FIRST = 1 / 4  # of the steps, where the worse half of the runs ends; of the others again at twice as many
_RECENT = 0.2  # share of the steps up to there whose mean loss counts


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to search.

    Attributes:
        budget: multiply-accumulates for one input, of every candidate's model.
        trials: candidates to be trained.
        hours: after which no further one is begun; None: no limit.
        families: of structures, see `Space`.
        roles: of linear layers that get a structure of their own, besides the one of all others: "attention_in",
            "attention_out", "up", "down".
        sampler: how candidates are chosen: "predictor" (`predictor.py`), "tpe" (Optuna's), "random".
        known: whether those of the literature come first (`Space.known`); not of "random".
        prune: whether runs end early that are behind half of the others.
        measure: what is to be least; None: the error that the data is judged by.
        time_weight: how much the time of a training step counts, see `Settings`.
        seed: of the choice.
        options: of all runs, see `Run.of`; structure and width are chosen.
    """

    budget: int
    trials: int = 60
    hours: float | None = None
    families: tuple[str, ...] = ("einsum",)
    roles: tuple[str, ...] = ()
    sampler: str = SAMPLERS[0]
    known: bool = True
    prune: bool = True
    measure: str | None = None
    time_weight: float = 0.0
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler must be {', '.join(SAMPLERS)}, not {self.sampler!r}")
        for name in ("budget", "trials"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.hours is not None and not self.hours > 0:
            raise ValueError(f"hours must be positive, not {self.hours:g}")
        if self.time_weight < 0:
            raise ValueError(f"time_weight must be at least 0, not {self.time_weight:g}")
        Space(self.families, self.roles)
        if taken := sorted(self.axes & self.options.keys()):
            raise ValueError(f"{' and '.join(taken)} cannot be set: they are what is searched for")

    @property
    def axes(self) -> frozenset[str]:
        """The options of the model that are chosen."""
        return frozenset({STRUCTURE, "width", *map(option_of, self.roles)})


def configure(**options: Any) -> Config:
    """A `Config` from its options and those of runs, by name; those that are None are left out."""
    given = {name: value for name, value in options.items() if value is not None}
    own = Config.__dataclass_fields__.keys() - {"options"}
    of_runs = {name: value for name, value in given.items() if name not in own}
    return parse(Config, {name: value for name, value in given.items() if name in own} | {"options": of_runs})


class Search:
    """A search in a results folder, once it is opened. It goes on where it was, and others may work in the same folder.

    Args:
        config: what to search.

    Raises:
        ValueError, OSError: what is wrong with the options or the data.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.base = _base(config)
        problem = self.base.data.load(self.base.seed)
        measure = config.measure or problem.error
        if measure not in problem.task.ERRORS:
            raise ValueError(f"measure must be one of {', '.join(problem.task.ERRORS)}, not {measure!r}")
        self.settings = Settings(measure, config.time_weight, config.budget, tuple(sorted(config.axes)))
        self.matching = Matching(self.base.model, problem.shape, config.budget)
        self.space = Space(config.families, config.roles)
        self.trust: Trust | None = None
        self._failed_before: set[int] = set()  # trials that another start may do again
        self._digest = problem.digest
        self._random = random.Random(config.seed)
        self._trials: dict[str, tuple[int, optuna.Trial]] = {}  # by the key of the run
        self._reported: dict[str, set[int]] = {}
        self._check_budget()

    def open(
        self,
        store: Store,
        storage: str | None = None,
        name: str | None = None,
        *,
        command: str = "",
        mix_code: bool = False,
    ) -> Search:
        """Make a results folder ready.

        Args:
            store: the folder.
            storage: of the study, see `open_study`.
            name: of the study; None: the one it has, or the folder's.
            command, mix_code: as of `Store.open`.

        Raises:
            ValueError: it holds something else.
        """
        kind = kind_of_storage(storage)  # before anything is written
        self.store = store
        store.open([self.base], self.config.axes, command, mix_code, {self.base.data: self._digest})
        self.settings = replace(self.settings, storage=kind, study=name).settle(store.folder)
        fixed = {option: value for option, value in self.base.identity.items() if option not in self.config.axes}
        settings = {"results folder": self.settings.id, "data digest": self._digest, **fixed}
        pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
        if self.config.prune:
            pruner = optuna.pruners.SuccessiveHalvingPruner(_rungs(self.base)[0], reduction_factor=2)
        self.study = open_study(store.folder, settings, storage, self.settings.study, pruner)
        return self

    def _seed(self) -> None:
        """Draw what no other driver of the study has drawn, and the same after an interruption as without one."""
        trials = len(self.study.optuna.get_trials(deepcopy=False))
        seed = random.Random(f"{self.config.seed}, {trials}").getrandbits(32)  # of which no two follow each other
        tpe = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        self.study.optuna.sampler = tpe if self.config.sampler == "tpe" else optuna.samplers.RandomSampler(seed)
        self._random.seed(seed)

    def _check_budget(self) -> None:
        """Raise ValueError if structures drawn at random have no model of the budget."""
        for _ in range(_DRAWN):
            try:
                self.matching.match(self.space.propose(lambda name: self._random.random()))
                return
            except DoesNotFit as error:
                last = error
        raise ValueError(f"none of {_DRAWN} structures drawn at random has a model of the budget: {last}")

    def do(self, pool: Pool, watch: Callable[[Event], None] = lambda event: None) -> list[Event]:
        """Train candidates until there are enough of them, and say which failed."""
        failed: list[Event] = []
        end = math.inf if self.config.hours is None else time.monotonic() + 3600 * self.config.hours
        self._failed_before = {own.number for own in self.study.failed()}
        with self.study.driving():
            while True:
                before = len(failed)
                for event in pool(self._jobs(end)):
                    self._record(event)
                    if event.status == "failed":
                        failed.append(event)
                    watch(event)
                if len(failed) == before:
                    break  # else there are too few: some failed when no more seemed to be needed
        self.study.close()
        return failed

    def _jobs(self, end: float) -> Iterator[Job]:
        """What others have left unfinished, then until the end new candidates, one whenever there is room for it."""
        orphans = deque[Tried]()
        while True:
            with self.study.alone():
                orphans += self.study.orphans()
                run = None if orphans or time.monotonic() > end else self._next()
            if orphans:
                own = orphans.popleft()
                self._trials[own.run.key] = own.number, self.study.trial(own)
                self._reported[own.run.key] = {*own.early}
                if self._result(own.run) is None:
                    yield own.run, self.store.path(own.run)
                else:
                    self._tell(own.number, own.run)
            elif run is None:
                return
            else:
                yield run, self.store.path(run)

    def _next(self) -> Run | None:
        """A candidate that nobody has tried; None if there are enough, as many have failed, or none is left."""
        self._seed()
        tried = self.study.tried()
        failed = [own for own in self.study.failed() if own.number not in self._failed_before]
        if max(len(tried), len(failed)) >= self.config.trials:
            return None
        taken = {own.candidate.signature: own for own in (*tried, *failed)}
        for vain in range(_VAIN):
            if not vain and (point := self._wanted(tried, taken.keys())):
                self.study.optuna.enqueue_trial(point)
            trial = self.study.optuna.ask()
            proposal = self.space.propose(partial(trial.suggest_float, low=0.0, high=1.0))
            try:
                candidate = Candidate.of(self.matching.match(proposal))
            except DoesNotFit as error:
                trial.set_user_attr(WHY, str(error))
                self.study.optuna.tell(trial, state=TrialState.FAIL)
                continue
            if same := taken.get(candidate.signature):
                trial.set_user_attr(SAME_AS, same.number)
                state = TrialState.COMPLETE if same.is_finished else TrialState.FAIL
                self.study.optuna.tell(trial, same.value, state)
                continue
            run = replace(self.base, model=at(self.base.model, candidate.width, candidate.specs))
            self.study.note(trial, candidate, run)
            self._trials[run.key] = trial.number, trial
            return run
        return None

    def _wanted(self, tried: Sequence[Tried], taken: Container[str]) -> dict[str, float] | None:
        """The point that is to be next; None where the sampler is to choose."""
        if point := next((point for signature, point in self._literature.items() if signature not in taken), None):
            return point
        return self._predicted(tried, taken) if self.config.sampler == "predictor" else None

    @cached_property
    def _literature(self) -> dict[str, dict[str, float]]:
        """The points that come first, by the signatures of their candidates."""
        found: dict[str, dict[str, float]] = {}
        for point in self.space.known if self.config.known and self.config.sampler != "random" else ():
            with suppress(DoesNotFit):
                found[Candidate.of(self.matching.match(self.space.propose(point.__getitem__))).signature] = point
        return found

    def _predicted(self, tried: Sequence[Tried], taken: Container[str]) -> dict[str, float] | None:
        """The predictor's choice: the less it is trusted, the more is left to chance."""
        losses = _losses(tried)
        if len(losses) < AT_LEAST:
            return None
        predictor = Predictor([_features(tried[i].candidate) for i in losses], [*losses.values()])
        self.trust = predictor.trust
        if self._random.random() > max(_LEAST_TRUST, predictor.trust.rank):
            return None
        found: list[tuple[dict[str, float], Candidate]] = []
        for _ in range(_POOL):
            point = defaultdict[str, float](self._random.random)
            proposal = self.space.propose(point.__getitem__)
            with suppress(DoesNotFit):
                candidate = Candidate.of(self.matching.match(proposal))
                if candidate.signature not in taken:
                    found.append((point, candidate))
        if not found:
            return None
        gains = predictor.improvement([_features(candidate) for _, candidate in found])
        return found[int(gains.argmax())][0]

    def _record(self, event: Event) -> None:
        """Tell the study what became of a run."""
        number, trial = self._trials[event.run.key]
        if event.status == "running" and self.config.prune:
            self._judge(trial, event)
        elif event.status == "finished":
            self._tell(number, event.run)
        elif event.status in ("stopped", "failed"):
            state = TrialState.PRUNED if event.status == "stopped" else TrialState.FAIL
            self.study.optuna.tell(number, state=state, skip_if_finished=True)

    def _judge(self, trial: optuna.Trial, event: Event) -> None:
        """Stop a run that is behind half of the others at the same step."""
        folder = self.store.path(event.run)
        for rung in _rungs(self.base):
            if event.step >= rung and rung not in self._reported.setdefault(event.run.key, set()):
                lines = [line for line in metrics.read(folder / METRICS) if _window(rung) <= line["step"] <= rung]
                losses = [line["train_loss"] for line in lines]
                if losses and None not in losses:
                    self._reported[event.run.key].add(rung)
                    seconds = lines[-1]["training_seconds"] / lines[-1]["step"]
                    trial.report(fmean(losses) * self.settings.of_time(seconds), rung)
                    # asked in any case, so that Optuna knows of it; the first ones are what the others are judged by
                    if trial.should_prune() and sum(own.is_finished for own in self.study.tried()) >= AT_LEAST:
                        stop(folder)
                        return

    def _tell(self, number: int, run: Run) -> None:
        if result := self._result(run):
            self.study.optuna.tell(number, self.settings.value(result), skip_if_finished=True)
        else:
            self.study.optuna.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def _result(self, run: Run) -> Result | None:
        """What a run came to, if it is finished."""
        try:
            return read_record(self.store.path(run)).result
        except ValueError:  # it has not begun, or cannot be read
            return None


def _base(config: Config) -> Run:
    """A run with all that candidates have in common; its losses are noted down often enough to be judged."""
    options = config.options
    has_heads = options.get("model") == "gpt" and options.get("d_head") is None
    base = Run.of({**({"heads": _HEADS, "d_head": None} if has_heads else {}), **options})
    if not config.prune:
        return base
    first, _ = _rungs(base)
    often = min(base.training.log_every, first - _window(first) + 1)
    return replace(base, training=replace(base.training, log_every=often))


def _rungs(base: Run) -> tuple[int, int]:
    """The steps after which runs are judged. Optuna's second rung is at twice the first, whatever the steps."""
    first = max(1, round(_FIRST * base.training.steps))
    return first, 2 * first


def _window(rung: int) -> int:
    """The first step whose loss counts for a rung."""
    return rung - round(_RECENT * rung)


def _losses(tried: Sequence[Tried]) -> dict[int, float]:
    """What runs came to, or may be expected to have come to if they ended early, by their places among all.

    Those that diverged count as much as the worst that did not.
    """
    found = {i: own.value for i, own in enumerate(tried) if own.value is not None and 0 < own.value < math.inf}
    finished = [(tried[i].early, value) for i, value in found.items()]
    for i, own in enumerate(tried):
        if own.value == math.inf and finished:
            found[i] = max(value for _, value in finished)
        elif own.state == TrialState.PRUNED and own.early:
            step = max(own.early)
            pairs = [(early[step], value) for early, value in finished if step in early]
            if len(pairs) >= AT_LEAST:
                found[i] = foretold(own.early[step], pairs)
    return found


def _features(candidate: Candidate) -> list[float]:
    """What the predictor knows: psi, nu and omega of one structure after the other, the width and the parameters."""
    exponents = [value for option in sorted(candidate.exponents) for value in candidate.exponents[option]]
    return [*exponents, math.log2(candidate.width), math.log2(candidate.params)]
