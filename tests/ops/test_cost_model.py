"""The coefficients of the cost model: calibrated on this machine where the file is sound, else the shipped ones."""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import einlinear as el
from einlinear.ops import cost_model, dispatch

SHIPPED = cost_model.read_costs()
DOUBLED = {mode: {name: [2 * c for c in own] for name, own in by.items()} for mode, by in SHIPPED.items()}


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of calibrated coefficients, in an empty cache."""
    monkeypatch.setattr(cost_model, "cache_folder", lambda: tmp_path / "cache")
    dispatch.forget()
    yield tmp_path / "cache" / "costs.json"
    dispatch.forget()


def explained() -> el.ops.Choice:
    return el.explain(el.Linear(256, 256, "btt"), torch.randn(64, 256))


def test_calibrated_coefficients_are_used(file: Path) -> None:
    shipped = explained()
    assert "by the cost model with shipped coefficients, for a training step" in shipped.reason
    assert not file.parent.exists()
    assert cost_model.write_calibrated(DOUBLED) == file
    assert explained() == shipped
    dispatch.forget()
    calibrated = explained()
    assert "with coefficients calibrated on this machine" in calibrated.reason
    assert dict(calibrated.estimates) == {name: pytest.approx(2 * us) for name, us in shipped.estimates}


@pytest.mark.skipif(os.name != "posix", reason="modes are those of POSIX")
def test_the_folder_is_private(file: Path) -> None:
    before = os.umask(0)
    try:
        cost_model.write_calibrated(DOUBLED)
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o666)
    assert cost_model.costs().source == "shipped coefficients"
    file.parent.chmod(0o777)
    with pytest.raises(PermissionError, match="can be changed by others"):
        cost_model.write_calibrated(DOUBLED)


def changed(**machine: object) -> str:
    return json.dumps({"machine": cost_model.fingerprint() | machine, **DOUBLED})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", "list indices"),
        ('{"forward": {}}', "'machine'"),
        (json.dumps({"machine": cost_model.fingerprint()}), "'forward'"),
        (changed(processor="abacus"), "processor was 'abacus', now"),
        (changed(torch="0.4.0"), "torch was '0.4.0', now"),
        (changed(cores=1000), "cores was 1000, now"),
        (changed().replace("[", "[1.0, ", 1), "the costs of dense (forward) are not six numbers from 0"),
        (changed().replace("[", "[-", 1), "the costs of dense (forward) are not six numbers from 0"),
        (changed().replace("[", "[NaN, ", 1), "NaN is no JSON"),
        (changed().replace("[", "[true, null, ", 1), "not six numbers"),
        (changed().replace(str(2 * SHIPPED["forward"]["dense"][0]), '"x"', 1), "not supported between"),
    ],
)
def test_a_damaged_or_foreign_file_is_named_and_ignored(
    file: Path, caplog: pytest.LogCaptureFixture, text: str, message: str
) -> None:
    file.parent.mkdir(mode=0o700)
    file.write_text(text)
    file.chmod(0o600)
    with caplog.at_level(logging.WARNING, "einlinear"):
        assert "shipped coefficients" in explained().reason
        explained()
    assert len(caplog.records) == 1
    warning = caplog.messages[0]
    assert str(file) in warning
    assert message in warning
    assert "einlinear bench --calibrate" in warning


def test_a_user_without_a_home_gets_the_shipped_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cost_model, "cache_folder", homeless)
    assert cost_model.costs().source == "shipped coefficients"
