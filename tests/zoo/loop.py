"""One loop over the kinds of models: what a user does with a structured model, and whether it worked."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tests.zoo.kinds import IMAGE, KINDS, Kind, inputs_of, make, takes
from torch import Tensor, nn

import einlinear as el

ROOT = Path(__file__).parents[2]
STRUCTURE = "btt"
EXACT = "monarch(blocks=1)"  # two factors of full rank: it represents every matrix
CLOSE = 1e-4
TRAINING = ("labels", "decoder_input_ids", "return_loss")  # inputs that generation does without
NOTHING = "—"  # the cell of a step that the kind has no use for


@dataclass
class Trial:
    """A kind on its way through the steps.

    Attributes:
        kind: which.
        folder: for what it saves.
        dense: the model that its class makes.
        model: the same, converted and trained.
        converted, skipped: from the report of `el.convert`.
        jobs: what a fresh process is to load: each a class and a folder, and where the outputs go.
        cells: by step "" if it worked, NOTHING, or what went wrong.
    """

    kind: Kind
    folder: Path
    dense: nn.Module
    model: nn.Module
    converted: int = 0
    skipped: tuple[tuple[str, str], ...] = ()
    jobs: list[dict[str, str]] = field(default_factory=list)
    cells: dict[str, str] = field(default_factory=dict)

    @property
    def inputs(self) -> dict[str, Any]:
        """An example, the same every time; anew, since some models change it in place."""
        return inputs_of(self.kind)


def run(kinds: Iterable[Kind], folder: Path, tell: Callable[[str], None] = lambda text: None) -> list[Trial]:
    """Take every kind through all steps. Models are saved in `folder`, and one fresh process loads all of them."""
    trials = []
    for number, kind in enumerate(kinds):
        tell(kind.name)
        dense = make(kind)
        trial = Trial(kind, folder / str(number), dense, copy.deepcopy(dense))
        trial.folder.mkdir()
        for name, step in STEPS.items():
            attempt(trial, name, step)
        trials.append(trial)
    tell("loading all of them in a fresh process")
    load([job for trial in trials for job in trial.jobs], folder)
    for trial in trials:
        for name, step in AFTER_LOADING.items():
            attempt(trial, name, step)
    return trials


def attempt(trial: Trial, name: str, step: Callable[[Trial], str]) -> None:
    if trial.cells.get(name):
        return  # it failed before, such as saving what was to be loaded
    torch.manual_seed(0)
    try:
        trial.cells[name] = step(trial)
    except Exception as error:
        trial.cells[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"


def train(trial: Trial) -> str:
    """Convert with new weights, then take four steps of AdamW at the learning rates of the structure."""
    report = el.convert(trial.model, STRUCTURE)
    trial.converted, trial.skipped = len(report.converted), report.skipped
    optimizer = torch.optim.AdamW(el.param_groups(trial.model, lr=1e-3, base=None))
    losses = [loss_of(trial.model, trial.inputs)]
    for _ in range(4):
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
        losses.append(loss_of(trial.model, trial.inputs))
    falls = losses[-1] < losses[0]
    return "" if falls else f"the loss does not fall: {', '.join(f'{float(loss.detach()):.4g}' for loss in losses)}"


def project(trial: Trial) -> str:
    """A structure that represents every matrix computes what the dense model does."""
    return difference(outputs_of(exact(trial), trial.inputs), outputs_of(trial.dense, trial.inputs))


def builds(trial: Trial) -> str:
    """A forward pass builds no dense matrix."""
    model = exact(trial)
    built: list[el.Linear] = []
    original = el.Linear.dense_weight
    with mock.patch.object(el.Linear, "dense_weight", lambda layer: (built.append(layer), original(layer))[1]):
        outputs_of(model, trial.inputs)
    names = [name for name, module in model.named_modules() if any(module is layer for layer in built)]
    return f"{len(built)} dense matrices are built, of {', '.join(names)}" if built else ""


def exact(trial: Trial) -> nn.Module:
    model = copy.deepcopy(trial.dense)
    el.convert(model, EXACT, weights="project")
    return model


def compress(trial: Trial) -> str:
    model = copy.deepcopy(trial.dense)
    report = el.compress(model, 0.6, ["low_rank"], calibration=[trial.inputs])
    if report.params > 0.6 * report.params_before:
        return f"{report.params} of {report.params_before} parameters are kept"
    return difference(outputs_of(model, trial.inputs), outputs_of(trial.dense, trial.inputs), close=float("inf"))


def generate(trial: Trial) -> str:
    """With a cache and without one, the same tokens from the same logits."""
    model: Any = trial.model
    if not getattr(model, "can_generate", lambda: False)():
        return NOTHING
    prompt = {name: value for name, value in trial.inputs.items() if name not in TRAINING}
    # a place of an image cannot be generated
    options = {
        "suppress_tokens": [IMAGE],
        "max_new_tokens": 4,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with_cache, without = (
        model.generate(**copy.deepcopy(prompt), **options, use_cache=cached) for cached in (True, False)
    )
    if not torch.equal(with_cache.sequences, without.sequences):
        return "other tokens without a cache"
    return difference(list(with_cache.logits), list(without.logits))


def densify(trial: Trial) -> str:
    model = copy.deepcopy(trial.model)
    el.densify(model)
    if left := [name for name, module in model.named_modules() if isinstance(module, el.Linear)]:
        return f"still structured: {', '.join(left)}"
    return difference(outputs_of(model, trial.inputs), outputs_of(trial.model, trial.inputs))


def save(trial: Trial) -> str:
    """Save the model, and where it has parts also the dense model of the same function, to compare them with."""
    model: Any = trial.model
    if not hasattr(model, "save_pretrained"):
        torch.save(model.state_dict(), trial.folder / "weights.pt")
        trial.jobs.append(job(trial, "", "structured"))
        return ""
    model.save_pretrained(trial.folder / "structured")
    trial.jobs.append(job(trial, type(model).__name__, "structured"))
    if trial.kind.parts:
        dense = copy.deepcopy(model)
        el.densify(dense)
        dense.save_pretrained(trial.folder / "dense")
        trial.jobs += [job(trial, part, which) for part in trial.kind.parts for which in ("structured", "dense")]
    return ""


def job(trial: Trial, part: str, which: str) -> dict[str, str]:
    out = str(trial.folder / f"{part}-{which}.pt")
    return {"kind": trial.kind.name, "class": part, "folder": str(trial.folder / which), "out": out}


def load(jobs: list[dict[str, str]], folder: Path) -> None:
    """Load saved models in one fresh process, which writes the outputs of each, or its error."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    code = "import sys\nfrom tests.zoo.loop import load_here\nload_here(sys.argv[1])"
    command = [sys.executable, "-c", code, str(folder / "jobs.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)


def load_here(jobs: str) -> None:
    import transformers

    torch.set_num_threads(1)
    for job in json.loads(Path(jobs).read_text()):
        kind = KINDS[job["kind"]]
        try:
            if job["class"]:
                cls = getattr(transformers, job["class"])
                model, info = cls.from_pretrained(job["folder"], output_loading_info=True)
                new = [parameter for name, parameter in model.named_parameters() if name in info["missing_keys"]]
                if 2 * len(new) > len(list(model.parameters())):
                    raise ValueError(f"most parameters are not in the folder: {', '.join(info['missing_keys'])}")
                for parameter in new:  # such as a pooler that the whole model has not
                    parameter.data.fill_(0.1)
            else:
                model = make(kind, seed=2)
                el.convert(model, STRUCTURE)
                model.load_state_dict(torch.load(Path(job["folder"]).parent / "weights.pt"))
            result: Any = outputs_of(model.eval(), takes(model, inputs_of(kind)))
        except Exception as error:
            result = f"{type(error).__name__}: {' '.join(str(error).split())}"
        torch.save(result, job["out"])


def whole(trial: Trial) -> str:
    """The model that a fresh process has loaded computes what the saved one does."""
    loaded = torch.load(trial.jobs[0]["out"])
    return loaded if isinstance(loaded, str) else difference(loaded, outputs_of(trial.model, trial.inputs))


def parts(trial: Trial) -> str:
    """A part that was loaded from the structured model computes what the one from the dense model does."""
    if not trial.kind.parts:
        return NOTHING
    wrong = []
    for part in trial.kind.parts:
        structured, dense = (torch.load(job(trial, part, which)["out"]) for which in ("structured", "dense"))
        if isinstance(dense, str):
            wrong.append(f"{part}, dense: {dense}")
        elif found := structured if isinstance(structured, str) else difference(structured, dense):
            wrong.append(f"{part}: {found}")
    return "; ".join(wrong)


STEPS = {
    "train": train,
    "project": project,
    "builds": builds,
    "compress": compress,
    "densify": densify,
    "generate": generate,
    "load": save,
}
AFTER_LOADING = {"load": whole, "parts": parts}


def loss_of(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The model's own loss if it has one, else the distance to outputs drawn from a seed."""
    output = model(**inputs)
    if isinstance(loss := getattr(output, "loss", None), Tensor):
        return loss
    outputs = [tensor for tensor in tensors(output) if tensor.requires_grad]
    return (outputs[0] - torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(2))).square().mean()


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    torch.manual_seed(0)  # some models draw, also in evaluation
    return list(tensors(model(**inputs)))


def tensors(output: Any) -> Iterator[Tensor]:
    """All floating-point tensors in what a model returns, but for its cache."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for name, value in output.items():
            if name not in ("past_key_values", "cache_params"):
                yield from tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors(value)


def difference(found: list[Tensor], expected: list[Tensor], close: float = CLOSE) -> str:
    """How far outputs are from others, relative to the largest of these; "" if they are finite and close."""
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        return f"outputs of shapes {[*map(lambda t: tuple(t.shape), found)]}, not {[tuple(t.shape) for t in expected]}"
    for one, other in zip(found, expected):
        if not torch.isfinite(one).equal(torch.isfinite(other)):
            return "outputs are not finite"
        keep = torch.isfinite(other)
        error = float((one - other)[keep].abs().max() / other[keep].abs().max().clamp_min(1e-6))
        if error > close:
            return f"outputs differ by {error:.2g}"
    return ""
