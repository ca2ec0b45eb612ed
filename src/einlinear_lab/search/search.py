"""The search: Optuna proposes structures, and each is trained at the same budget until there are enough trials."""

from __future__ import annotations

import math
import random
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from statistics import fmean

import optuna
from optuna.trial import TrialState

from einlinear.structures import DoesNotFit
from einlinear_lab.pools.local import stop
from einlinear_lab.pools.pool import Event, Job, Pool
from einlinear_lab.runs.records import METRICS, Record, read_record
from einlinear_lab.runs.run import Run
from einlinear_lab.runs.store import Store
from einlinear_lab.search.config import SAMPLERS, STARTUP_TRIALS, SearchConfig, SearchManifest
from einlinear_lab.search.matching import Architecture, Matching
from einlinear_lab.search.space import Point, SearchSpace
from einlinear_lab.search.study import kind_of_storage, open_study
from einlinear_lab.training import metrics

# Of a gpt without heads, whatever its width, which has to be a multiple of them.
_HEADS = 4
# Random structures, at least one of which must have a model of the budget.
_DRAWS = 20
# Proposals in a row that fit no budget or repeat a trial: after a few, random ones follow; after all, none is left.
_FEW, _ALL = 4, 200
# The share of the steps after which the worse half of the trials is pruned. Optuna's second rung is at twice as many.
_FIRST_RUNG = 1 / 4
# The share of the steps up to a rung whose mean loss counts.
_WINDOW = 0.2


class Search:
    """A search in a results folder, once it is opened. It resumes, and other drivers may work in the same folder."""

    def __init__(self, config: SearchConfig) -> None:
        # Below errors, Optuna reports studies, trials and packages that would make the Gaussian process faster.
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.config = config
        self.base = base_run(config)
        problem = self.base.data.load(self.base.seed)
        metric = config.metric or problem.metric
        if metric not in problem.task.METRICS_TO_MINIMISE:
            raise ValueError(f"metric must be one of {', '.join(problem.task.METRICS_TO_MINIMISE)}, not {metric!r}")
        self.manifest = SearchManifest(metric, config.time_weight, config.budget, tuple(sorted(config.axes)))
        self.matching = Matching(self.base.model, problem.shape, config.budget)
        self.space = SearchSpace(config.families, config.roles)
        self._digest, self._rungs = problem.data_digest, rungs_of(self.base)
        # Trials that failed before this driver started may be tried again.
        self._failed_before: set[int] = set()
        # The trial and the rungs that it has not reached, by the key of its run.
        self._trials: dict[str, tuple[optuna.Trial, list[int]]] = {}
        self._check_budget()

    def open(
        self,
        store: Store,
        storage: str | None = None,
        name: str | None = None,
        command: str = "",
        mix_code: bool = False,
    ) -> Search:
        """Prepare a results folder, with the storage and the name (None: the folder's) of the study."""
        # Before anything is written.
        kind = kind_of_storage(storage)
        self.store = store
        store.open([self.base], self.config.axes, command, mix_code, {self.base.data: self._digest})
        self.manifest = replace(self.manifest, storage=kind, study=name).write(store.folder)
        fixed = {option: value for option, value in self.base.hyperparameters.items() if option not in self.config.axes}
        config = {"results folder": self.manifest.id, "data digest": self._digest, **fixed}
        pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
        if self.config.prune:
            pruner = optuna.pruners.SuccessiveHalvingPruner(self._rungs[0], reduction_factor=2)
        self.study = open_study(store.folder, config, storage, self.manifest.study or "", pruner)
        return self

    def run_trials(self, pool: Pool, watch: Callable[[Event], None] = lambda event: None) -> list[Event]:
        """Train models until there are enough trials, and return the events of those that failed."""
        failed: list[Event] = []
        end = math.inf if self.config.hours is None else time.monotonic() + 3600 * self.config.hours
        self._failed_before = {trial.number for trial in self.study.failed()}
        with self.study.driving():
            before = -1
            # The pool may have asked for its last job before a run failed.
            while before < len(failed):
                before = len(failed)
                for event in pool(self._jobs(end)):
                    self._record(event)
                    if event.status == "failed":
                        failed.append(event)
                    watch(event)
        self.study.close()
        return failed

    def _jobs(self, end: float) -> Iterator[Job]:
        """Yield the unfinished trials of dead drivers, then new ones until the end, one whenever the pool has room."""
        while True:
            with self.study.choosing():
                orphans = self.study.adopt_orphans()
                run = None if orphans or time.monotonic() > end else self.next_run()
            for orphan, trial in orphans:
                rungs = [rung for rung in self._rungs if rung not in orphan.frozen.intermediate_values]
                self._trials[orphan.run.key] = trial, rungs
                if self._finished(orphan.run) is None:
                    yield orphan.run, self.store.path(orphan.run)
                else:
                    self._complete(trial, orphan.run)
            if run is not None:
                yield run, self.store.path(run)
            elif not orphans:
                return

    def next_run(self) -> Run | None:
        """Start the next trial and return its run; None with enough trials, as many failures, or no structure left."""
        trained = self.study.trained()
        failed = [trial for trial in self.study.failed() if trial.number not in self._failed_before]
        if max(len(trained), len(failed)) >= self.config.trials:
            return None
        first = {trial.architecture.signature: trial for trial in (*trained, *failed)}
        number = len(self.study.optuna.get_trials(deepcopy=False))
        if point := next((point for signature, point in self._literature.items() if signature not in first), None):
            self.study.optuna.enqueue_trial(dict(point))
        for attempt in range(_ALL):
            trial = self._ask(self.config.sampler if attempt < _FEW else "random", number + attempt)
            try:
                architecture = self._architecture(trial.params)
            except DoesNotFit as error:
                self.study.reject(trial, str(error))
                continue
            if same := first.get(architecture.signature):
                self.study.repeat(trial, same)
                continue
            run = replace(self.base, model=architecture.model(self.base.model))
            self.study.start(trial, architecture, run)
            self._trials[run.key] = trial, list(self._rungs)
            return run
        return None

    def _ask(self, sampler: str, number: int) -> optuna.Trial:
        """Create a trial. The seed is the same after an interruption as without one, and never another driver's."""
        seed = random.Random(f"{self.config.seed}, {number}").getrandbits(32)
        with warnings.catch_warnings():
            # Optuna 4 warns of experimental samplers, and Gaussian processes of infinite values, which they clip.
            warnings.simplefilter("ignore")
            self.study.optuna.sampler = SAMPLERS[sampler](seed)
            return self.study.optuna.ask(self.space.coordinates)

    def _architecture(self, point: Point) -> Architecture:
        return self.matching.match(self.space.propose(point))

    @cached_property
    def _literature(self) -> dict[str, Point]:
        """The points of the warm start, by the signatures of their architectures."""
        points: dict[str, Point] = {}
        if self.config.warm_start and self.config.sampler != "random":
            for point in self.space.literature:
                with suppress(DoesNotFit):
                    points[self._architecture(point).signature] = point
        return points

    def _check_budget(self) -> None:
        """Raise ValueError if structures drawn at random have no model of the budget."""
        study = optuna.create_study(sampler=SAMPLERS["random"](self.config.seed))
        for _ in range(_DRAWS):
            try:
                self._architecture(study.ask(self.space.coordinates).params)
                return
            except DoesNotFit as error:
                last = error
        raise ValueError(f"none of {_DRAWS} structures drawn at random has a model of the budget: {last}")

    def _record(self, event: Event) -> None:
        trial, rungs = self._trials[event.run.key]
        if event.status == "running" and self.config.prune:
            self._prune(trial, rungs, event)
        elif event.status == "finished":
            self._complete(trial, event.run)
        elif event.status in ("stopped", "failed"):
            state = TrialState.PRUNED if event.status == "stopped" else TrialState.FAIL
            self.study.optuna.tell(trial.number, state=state, skip_if_finished=True)

    def _prune(self, trial: optuna.Trial, rungs: list[int], event: Event) -> None:
        """Report the losses at the rungs that a run has reached, and stop the run if Optuna prunes its trial."""
        folder = self.store.path(event.run)
        while rungs and event.step >= rungs[0]:
            window = range(_window_of(rungs[0]), rungs[0] + 1)
            # Lines of an evaluation have no training loss.
            lines = [line for line in metrics.read(folder / METRICS) if "train_loss" in line and line["step"] in window]
            losses = [line["train_loss"] for line in lines]
            if not losses or None in losses:
                return
            seconds = lines[-1]["training_seconds"] / lines[-1]["step"]
            trial.report(fmean(losses) * self.manifest.time_factor(seconds), rungs.pop(0))
            # Optuna notes the rung when asked. The first trials are never pruned: the others are judged by them.
            if trial.should_prune() and sum(t.value is not None for t in self.study.trained()) >= STARTUP_TRIALS:
                stop(folder)
                return

    def _complete(self, trial: optuna.Trial, run: Run) -> None:
        record = self._finished(run)
        state = TrialState.FAIL if record is None else TrialState.COMPLETE
        value = None if record is None else self.manifest.objective(record)
        self.study.optuna.tell(trial.number, value, state, skip_if_finished=True)

    def _finished(self, run: Run) -> Record | None:
        """Return the record of a run, None while the run is not finished."""
        try:
            record = read_record(self.store.path(run))
        # The run has not begun, or its files are damaged.
        except ValueError:
            return None
        return record if record.result else None


def base_run(config: SearchConfig) -> Run:
    """Return a run with all that the trials share, which logs losses often enough to be pruned."""
    has_heads = config.options.get("model") == "gpt" and config.options.get("d_head") is None
    base = Run.of({**({"heads": _HEADS, "d_head": None} if has_heads else {}), **config.options})
    if not config.prune:
        return base
    first, _ = rungs_of(base)
    log_every = min(base.training.log_every, first - _window_of(first) + 1)
    return replace(base, training=replace(base.training, log_every=log_every))


def rungs_of(base: Run) -> tuple[int, int]:
    """Return the steps after which trials may be pruned. Optuna puts the second rung at twice the first."""
    first = max(1, round(_FIRST_RUNG * base.training.steps))
    return first, 2 * first


def _window_of(rung: int) -> int:
    """Return the first step whose loss counts for a rung."""
    return rung - round(_WINDOW * rung)
