"""What is remembered of a search: an Optuna study, and in the results folder the runs of its trials.

Every trial that trains has noted, before it starts, which driver it belongs to, its candidate and its run. A driver
holds a lock as long as it lives, so that others can tell which trials nobody works on any more.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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
from einlinear.structures import structure
from einlinear_lab.runs.passwords import without_passwords
from einlinear_lab.runs.run import Run
from einlinear_lab.search.matching import Matched
from einlinear_lab.search.settings import LOCK
from einlinear_lab.search.space import STRUCTURE

SQLITE, JOURNAL = "study.sqlite", "study.journal"
_DRIVERS = "drivers"
_SETTINGS, _DRIVER, _CANDIDATE, _RUN, SAME_AS, WHY = "settings", "driver", "candidate", "run", "same as", "why"
_EINSUM = "einsum"
_TAKEN = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)


@dataclass(frozen=True)
class Candidate:
    """Structures at their sizes, as they are noted.

    Attributes:
        specs, width, macs, params: as of `Matched`.
        exponents: psi, nu and omega of each structure, by the option of the model.
        signature: equal for candidates that are the same model.
    """

    specs: Mapping[str, str]
    width: int
    macs: int
    params: int
    exponents: Mapping[str, Sequence[float]]
    signature: str

    @property
    def spec(self) -> str:
        """The structure of the layers whose role has none of its own."""
        return self.specs[STRUCTURE]

    @classmethod
    def of(cls, matched: Matched) -> Candidate:
        exponents = {}
        for option, (in_features, out_features, *_) in reversed(matched.sizes):  # the first layer's are kept
            s = structure(matched.specs[option], in_features, out_features)
            exponents[option] = s.psi, s.nu, s.omega
        # all einsums have one pattern, so that their sizes tell them apart
        kinds = {option: _EINSUM if spec.startswith(_EINSUM) else spec for option, spec in matched.specs.items()}
        signature = f"{kinds} {matched.sizes}"
        return cls(matched.specs, matched.width, matched.macs, matched.params, exponents, signature)


@dataclass(frozen=True)
class Tried:
    """A trial that trains, or did.

    Attributes:
        number: of the trial.
        state: its state.
        candidate: what it is about.
        run: its run.
        value: what the search minimises; None while it is not finished.
        early: what it was judged by on the way, by the step.
        driver: that did it last.
    """

    number: int
    state: TrialState
    candidate: Candidate
    run: Run
    value: float | None
    early: Mapping[int, float]
    driver: str

    @property
    def is_finished(self) -> bool:
        return self.state == TrialState.COMPLETE


class Study:
    """An Optuna study of a results folder, as one driver sees it; made by `open_study`."""

    def __init__(self, study: optuna.Study, storage: BaseStorage, folder: Path) -> None:
        self.optuna = study
        self._storage, self._folder = storage, folder
        self._driver = uuid.uuid4().hex[:12]

    @contextmanager
    def driving(self) -> Iterator[None]:
        """Be alive, as others see it."""
        path = self._alive(self._driver)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path):
            yield
        path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the database; whoever asks something connects again."""
        if isinstance(self._storage, RDBStorage):
            self._storage.remove_session()
            self._storage.engine.dispose()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else chooses a candidate meanwhile."""
        with FileLock(self._folder / LOCK):
            yield

    def tried(self) -> list[Tried]:
        """All trials that train or did, in order."""
        return self._of(_TAKEN)

    def failed(self) -> list[Tried]:
        """Those whose training failed."""
        return self._of((TrialState.FAIL,))

    def _of(self, states: Sequence[TrialState]) -> list[Tried]:
        return [
            Tried(
                trial.number,
                trial.state,
                Candidate(**trial.user_attrs[_CANDIDATE]),
                Run.of(trial.user_attrs[_RUN]),
                trial.value if trial.state == TrialState.COMPLETE else None,
                trial.intermediate_values,
                trial.user_attrs[_DRIVER],
            )
            for trial in self._trials()
            if _RUN in trial.user_attrs and trial.state in states
        ]

    def note(self, trial: optuna.Trial, candidate: Candidate, run: Run) -> None:
        """Say what a trial is about to train. The run comes last: without it nothing was begun."""
        trial.set_user_attr(_DRIVER, self._driver)
        trial.set_user_attr(_CANDIDATE, asdict(candidate))
        trial.set_user_attr(_RUN, run.options)

    def orphans(self) -> list[Tried]:
        """The trials whose drivers are dead: from now on they are this one's. To be called `alone`."""
        for trial in self._trials():
            if trial.state == TrialState.RUNNING and _RUN not in trial.user_attrs:
                self.optuna.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)  # it had not begun
        found = [own for own in self.tried() if own.state == TrialState.RUNNING and self._is_dead(own.driver)]
        for own in found:
            self.trial(own).set_user_attr(_DRIVER, self._driver)
        return found

    def trial(self, own: Tried) -> optuna.Trial:
        """As Optuna sees it."""
        return optuna.Trial(self.optuna, self._trials()[own.number]._trial_id)

    def _trials(self) -> list[FrozenTrial]:
        return self.optuna.get_trials(deepcopy=False)

    def _is_dead(self, driver: str) -> bool:
        if driver == self._driver:
            return False
        try:
            with FileLock(self._alive(driver), timeout=0):
                return True
        except Timeout:
            return False

    def _alive(self, driver: str) -> Path:
        return self._folder / _DRIVERS / f"{driver}.lock"


def open_study(
    folder: Path,
    settings: Mapping[str, Any],
    storage: str | None = None,
    name: str | None = None,
    pruner: optuna.pruners.BasePruner | None = None,
) -> Study:
    """The study of a results folder, new or to go on with.

    Args:
        folder: which is there.
        settings: what makes losses comparable.
        storage: a database's URL, "journal" for a file that many machines may append to, None for SQLite, both in the
            folder.
        name: of the study; None: the folder's.
        pruner: as of Optuna.

    Raises:
        ValueError: the study is about something else.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with FileLock(folder / LOCK):  # two drivers that make the tables of a database at once fail
        kept = _storage(folder, storage)
        study = optuna.create_study(
            storage=kept,
            study_name=name or folder.resolve().name,
            direction="minimize",
            load_if_exists=True,
            pruner=pruner,
        )
        before = study.user_attrs.get(_SETTINGS)
        if before is None:
            study.set_user_attr(_SETTINGS, dict(settings))
    if before is not None and (changed := differences(before, settings)):
        raise ValueError(
            f"the study {study.study_name} is about something else: {'; '.join(changed)}. Name another folder (--out)"
        )
    return Study(study, kept, folder)


def kind_of_storage(storage: str | None) -> str:
    """ "sqlite" and "journal" are in the results folder, "database" anywhere.

    Raises:
        ValueError: neither, nor the URL of a database that answers and whose driver is installed.
    """
    if storage is None or storage == "journal":
        return storage or "sqlite"
    shown = without_passwords(storage)
    try:
        engine = create_engine(storage)
    except (ArgumentError, ModuleNotFoundError) as error:
        why = without_passwords(str(error).replace(storage, shown))
        raise ValueError(f"storage must be journal or the URL of a database, not {shown!r}: {why}") from None
    try:
        engine.connect().close()
    except (SQLAlchemyError, TypeError, ValueError) as error:  # of what follows the "?", drivers know not all
        why = _without_secrets(str(error).partition("\n")[0], engine.url)
        raise ValueError(f"the database {shown} does not answer: {why}") from None
    finally:
        engine.dispose()
    return "database"


def _without_secrets(text: str, url: URL) -> str:
    """What a driver says, which may repeat what it was given."""
    values = [value for given in url.query.values() for value in ([given] if isinstance(given, str) else given)]
    for secret in filter(None, [url.password, *(value for value in values if len(value) > 3)]):
        text = text.replace(secret, "***")
    return without_passwords(text)


def _storage(folder: Path, storage: str | None) -> BaseStorage:
    if storage == "journal":
        return JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    if storage is None:
        # another process may hold the file for a while
        return RDBStorage(f"sqlite:///{folder / SQLITE}", engine_kwargs={"connect_args": {"timeout": 60}})
    return RDBStorage(storage)
