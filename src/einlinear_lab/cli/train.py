"""The command `einlinear train`."""

from __future__ import annotations

from pathlib import Path

from einlinear_lab.cli import display
from einlinear_lab.cli.packages import LAB, require
from einlinear_lab.cli.parsing import RunConfig, assignments
from einlinear_lab.cli.running import bar, check_here, say_skipped


def train_command(config: RunConfig = None, out: Path | None = None) -> None:
    """Train one model.

    Without steps=NUMBER there are 20 passes over the data, but at least 200 and at most 5,000 steps.

    After an interruption the same command resumes from the last checkpoint; checkpoint_every=100 writes one every 100
    steps. Under torchrun all processes train the model together: parallel=ddp or parallel=fsdp.

    For example:  einlinear train model=gpt data=data/english structure="btt(rank=2)" width=256 steps=2000 lr=3e-3

    Args:
        out: Folder of the run: its checkpoints, metrics and result. Default: one of its own in results/train.
    """
    require(LAB)
    from einlinear_lab.runs.execution import check_runs, execute
    from einlinear_lab.runs.records import check_folder, describe
    from einlinear_lab.runs.run import Run, with_defaults
    from einlinear_lab.training.distributed import is_first

    with display.user_errors():
        options = assignments(config)
        # out=FOLDER is written like the other options.
        named = options.pop("out", None)
        options, reasons = with_defaults(options)
        run = Run.of(options)
        folder = out or Path(named or Path("results", "train", run.name))
        check_here([run])
        check_runs([run])
        check_folder(describe(folder, run, run.data.load(run.seed)))
        if is_first():
            say_skipped([run])
            for sentence in reasons:
                display.note(f"{sentence}.")
            display.note(f"In {folder}. The same command resumes it, or shows its result.")
    interrupted = "Interrupted. The same command resumes from the last checkpoint, if checkpoint_every was set."
    with display.interruptible(interrupted), bar(run) as progress, display.system_errors():
        result = execute(run, folder, progress, keep_checkpoints=True)
    if not is_first():
        return
    loss = "diverged" if result.train_loss is None else f"{result.train_loss:.4f}"
    rows = [("parameters", f"{result.params:,}"), ("MACs of an input", f"{result.macs:,}"), ("train loss", loss)]
    rows += [(name.replace("_", " "), f"{value:.4f}") for name, value in result.metrics.items()]
    if result.step_seconds:
        rows.append(("inputs a second", f"{result.inputs / result.step_seconds:,.0f}"))
    display.show(("", run.name), rows)
