"""The Optuna study of a search; the runs of its trials are in the results folder.

A driver holds a lock as long as it lives, so that others resume the trials of dead ones at once, in every storage.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import URL, create_engine
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from einlinear.files import differences
from einlinear_lab.runs.passwords import without_passwords
from einlinear_lab.runs.run import Run
from einlinear_lab.search.config import LOCK
from einlinear_lab.search.matching import Architecture

SQLITE, JOURNAL = "study.sqlite", "study.journal"
SAME_AS = "same as"
_DRIVERS = "drivers"
_CONFIG, _DRIVER, _ARCHITECTURE, _RUN, _REASON = "config", "driver", "architecture", "run", "reason"
_TRAINED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)


@dataclass(frozen=True)
class SearchTrial:
    """A trial of Optuna that trains a model or has done so."""

    frozen: FrozenTrial

    @property
    def number(self) -> int:
        return self.frozen.number

    @property
    def state(self) -> TrialState:
        return self.frozen.state

    @property
    def value(self) -> float | None:
        """The objective; None while the trial is not complete."""
        return self.frozen.value if self.state == TrialState.COMPLETE else None

    @cached_property
    def architecture(self) -> Architecture:
        return Architecture(**self.frozen.user_attrs[_ARCHITECTURE])

    @cached_property
    def run(self) -> Run:
        return Run.of(self.frozen.user_attrs[_RUN])


class SearchStudy:
    """An Optuna study of a results folder, as one driver sees it; `open_study` returns it."""

    def __init__(self, study: optuna.Study, storage: BaseStorage, folder: Path) -> None:
        self.optuna = study
        self._storage, self._folder = storage, folder
        self._driver = uuid.uuid4().hex[:12]

    @contextmanager
    def driving(self) -> Iterator[None]:
        """Hold the lock that shows other drivers that this one is alive."""
        path = self._lock_of(self._driver)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path):
            yield
        path.unlink(missing_ok=True)

    def choosing(self) -> FileLock:
        """Return the lock under which trials are created, so that no two drivers choose the same."""
        return FileLock(self._folder / LOCK)

    def close(self) -> None:
        """Disconnect from the database; the next query connects again."""
        if isinstance(self._storage, RDBStorage):
            self._storage.remove_session()
            self._storage.engine.dispose()

    def trained(self) -> list[SearchTrial]:
        """All trials that train or have been trained, pruned ones included, in order."""
        return self._trials(_TRAINED)

    def failed(self) -> list[SearchTrial]:
        return self._trials((TrialState.FAIL,))

    def start(self, trial: optuna.Trial, architecture: Architecture, run: Run) -> None:
        """Note the model that a trial is about to train. The run comes last: a trial without it has not begun."""
        trial.set_user_attr(_DRIVER, self._driver)
        trial.set_user_attr(_ARCHITECTURE, asdict(architecture))
        trial.set_user_attr(_RUN, run.config)

    def reject(self, trial: optuna.Trial, reason: str) -> None:
        """Fail a trial that is not trained."""
        trial.set_user_attr(_REASON, reason)
        self.optuna.tell(trial, state=TrialState.FAIL)

    def repeat(self, trial: optuna.Trial, first: SearchTrial) -> None:
        """Give a trial the value of the first one of the same model, from which samplers learn; fail it without one."""
        trial.set_user_attr(SAME_AS, first.number)
        state = TrialState.FAIL if first.value is None else TrialState.COMPLETE
        self.optuna.tell(trial, first.value, state)

    def adopt_orphans(self) -> list[tuple[SearchTrial, optuna.Trial]]:
        """Make the trials of dead drivers this driver's. To be called while `choosing`."""
        for frozen in self.optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if _RUN not in frozen.user_attrs:
                self.optuna.tell(frozen.number, state=TrialState.FAIL, skip_if_finished=True)
        running = self._trials((TrialState.RUNNING,))
        orphans = [trial for trial in running if self._is_dead(trial.frozen.user_attrs[_DRIVER])]
        adopted = [(orphan, optuna.Trial(self.optuna, orphan.frozen._trial_id)) for orphan in orphans]
        for _, trial in adopted:
            trial.set_user_attr(_DRIVER, self._driver)
        return adopted

    def _trials(self, states: Sequence[TrialState]) -> list[SearchTrial]:
        trials = self.optuna.get_trials(deepcopy=False, states=tuple(states))
        return [SearchTrial(frozen) for frozen in trials if _RUN in frozen.user_attrs]

    def _is_dead(self, driver: str) -> bool:
        if driver == self._driver:
            return False
        try:
            with FileLock(self._lock_of(driver), timeout=0):
                return True
        except Timeout:
            return False

    def _lock_of(self, driver: str) -> Path:
        return self._folder / _DRIVERS / f"{driver}.lock"


def open_study(
    folder: Path, config: Mapping[str, Any], storage: str | None, name: str, pruner: optuna.pruners.BasePruner
) -> SearchStudy:
    """Create the study of a results folder, or load it; `config` is all that makes losses comparable.

    Storage is a database's URL, "journal" for a file that many machines may append to, or None for SQLite.
    """
    # Two drivers that create the tables of a database at the same time fail.
    with FileLock(folder / LOCK):
        backend = _storage(folder, storage)
        study = optuna.create_study(storage=backend, study_name=name, load_if_exists=True, pruner=pruner)
        stored = study.user_attrs.get(_CONFIG)
        if stored is None:
            study.set_user_attr(_CONFIG, dict(config))
    if stored is not None and (changed := differences(stored, config)):
        raise ValueError(f"the study {name} has another config: {'; '.join(changed)}. Name another folder (--out)")
    return SearchStudy(study, backend, folder)


def kind_of_storage(storage: str | None) -> str:
    """Return "sqlite", "journal" or "database"; raise ValueError for a database that does not answer."""
    if storage is None or storage == "journal":
        return storage or "sqlite"
    shown = without_passwords(storage)
    try:
        engine = create_engine(storage)
    except (ArgumentError, ModuleNotFoundError) as error:
        reason = without_passwords(str(error).replace(storage, shown))
        raise ValueError(f"storage must be journal or the URL of a database, not {shown!r}: {reason}") from None
    try:
        engine.connect().close()
    # Drivers raise TypeError and ValueError for some of the parameters after the "?".
    except (SQLAlchemyError, TypeError, ValueError) as error:
        reason = _without_secrets(str(error).partition("\n")[0], engine.url)
        raise ValueError(f"the database {shown} does not answer: {reason}") from None
    finally:
        engine.dispose()
    return "database"


def _without_secrets(text: str, url: URL) -> str:
    """Hide the password and the parameters of an URL in a driver's message, which may repeat them."""
    values = [value for part in url.query.values() for value in ([part] if isinstance(part, str) else part)]
    for secret in filter(None, [url.password, *(value for value in values if len(value) > 3)]):
        text = text.replace(secret, "***")
    return without_passwords(text)


def _storage(folder: Path, storage: str | None) -> BaseStorage:
    if storage == "journal":
        return JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    if storage is None:
        # Another process may hold the file for a while.
        return RDBStorage(f"sqlite:///{folder / SQLITE}", engine_kwargs={"connect_args": {"timeout": 60}})
    return RDBStorage(storage)
