"""The errors that candidates are said to leave are those that they leave; and which there are."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tests.ops.test_projection_of_outputs import correlated, error
from torch import nn

from einlinear import ops
from einlinear.compression import compress
from einlinear.compression.candidates import estimated_errors, members, members_to_fit
from einlinear.compression.sensitivity import SensitivityProbe
from einlinear.compression.spectrum import Spectrum, low_ranks


@pytest.mark.parametrize("size", [(48, 64), (64, 48)])
def test_the_spectrum_is_the_errors_of_low_rank(size: tuple[int, int]) -> None:
    w, moment = torch.randn(size[1], size[0], dtype=torch.float64), correlated(size[0])
    spectrum = Spectrum.of(w, low_ranks(w, moment, None)[2])
    for s in members("low_rank", *size):
        expected = error(s, w, ops.project(s, w, moment), moment)
        assert spectrum.at(s.params / w.numel()) == pytest.approx(expected, rel=1e-3)
    assert spectrum.errors[0] == pytest.approx(1.0)
    assert len(spectrum.errors) == 49


def test_the_spectrum_of_a_diagonal_weight() -> None:
    w = torch.diag(torch.tensor([1.0, 2.0, 0.0]))
    spectrum = Spectrum.of(w, low_ranks(w, torch.eye(3), None)[2])
    assert spectrum.errors == pytest.approx((1.0, 0.2, 0.0, 0.0))
    assert spectrum.share == pytest.approx(2 / 3)


@pytest.mark.parametrize("family", ["monarch", "btt", "blast(blocks=4)", "low_rank"])
def test_errors_between_those_that_are_fitted(family: str) -> None:
    w, moment = torch.randn(64, 96, dtype=torch.float64), correlated(96)
    considered = list(members(family, 96, 64))
    found = {s.spec: error(s, w, ops.project(s, w, moment), moment) for s in considered}
    known = {s.spec: found[s.spec] for s in members_to_fit(considered, (0.25, 0.5, 0.75))}
    assert len(known) == (0 if family == "low_rank" else 3)
    guesses = estimated_errors(considered, known, Spectrum.of(w, low_ranks(w, moment, None)[2]))
    assert guesses.keys() == found.keys()
    for s in considered:
        if 0.15 < s.params / w.numel() < 0.85:
            assert guesses[s.spec] == pytest.approx(found[s.spec], rel=0.2), s.spec


def test_other_budgets_share_what_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 24))
    data = [torch.randn(64, 24)]
    alone = compress(copy.deepcopy(model), 0.4, ["low_rank", "monarch"], data)
    shared = tmp_path / "shared"
    compress(copy.deepcopy(model), 0.7, ["low_rank", "monarch"], data, shared_cache_dir=shared)
    fits = []
    project = ops.project
    monkeypatch.setattr(ops, "project", lambda *given, **more: fits.append(given) or project(*given, **more))
    with monkeypatch.context() as patched:  # what is compared is known: no inputs are needed for it
        patched.setattr(Spectrum, "of", None)
        patched.setattr(SensitivityProbe, "output_change", None)
        again = compress(copy.deepcopy(model), 0.4, ["low_rank", "monarch"], data, shared_cache_dir=shared)
    assert len(fits) == sum(layer.structure != "dense" for layer in again.layers)  # none to compare
    assert [(layer.structure, layer.expected_error) for layer in again.layers] == [
        (layer.structure, layer.expected_error) for layer in alone.layers
    ]
    with pytest.raises(ValueError, match="another config \\(model and data\\)"):
        compress(copy.deepcopy(model), 0.4, ["low_rank"], [2 * data[0]], shared_cache_dir=shared)
    with pytest.raises(ValueError, match=r"cache_dir and shared_cache_dir are both .*: give two folders"):
        compress(copy.deepcopy(model), 0.4, ["low_rank"], data, cache_dir=shared, shared_cache_dir=shared)


@pytest.mark.parametrize("argument", ["cache_dir", "shared_cache_dir"])
@pytest.mark.parametrize("inside", ["", "cache"])
def test_a_file_in_the_place_of_a_cache(argument: str, inside: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = nn.Sequential(nn.Linear(24, 24))
    model.register_forward_hook(lambda *_: pytest.fail("the model is run first"))
    with pytest.raises(ValueError, match=rf"^{argument} .*file.* cannot be a folder: .*file is a file$"):
        compress(model, 0.4, ["low_rank"], [torch.randn(64, 24)], **{argument: tmp_path / "file" / inside})


def test_members_of_families() -> None:
    ranks = [s.spec for s in members("low_rank", 64, 32)]
    assert len(ranks) == len(set(ranks)) > 10
    assert all(s.params < 64 * 32 for s in members("monarch", 64, 32))
    assert [s.spec for s in members("btt(rank=1)", 64, 64)] == ["btt"]
    assert list(members("monarch(blocks=4)", 64, 2)) == []  # no room for four blocks
    with pytest.raises(ValueError, match=r"unknown family 'lowrank'\. Did you mean 'low_rank'"):
        list(members("lowrank", 64, 64))
