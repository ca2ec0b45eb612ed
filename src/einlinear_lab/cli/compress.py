"""`einlinear compress`: its options, and what it prints."""

from __future__ import annotations

import copy
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from einlinear.files import alone_beside
from einlinear_lab.cli import display
from einlinear_lab.cli.endings import interruptible, system_errors, user_errors
from einlinear_lab.cli.packages import PRETRAINED, require
from einlinear_lab.cli.parsing import specs

if TYPE_CHECKING:
    from einlinear.compression import CompressionReport
    from einlinear_lab.pretrained.speed import Speed

_SHOWN = 10  # of the files that are not copied


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder of a transformers model, or its name on the hub.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the compressed model; from_pretrained loads it.")],
    keep_params: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Fraction of the layers' parameters to keep, such as 0.5.")
    ] = None,
    keep_macs: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Or of their multiply-accumulates.")] = None,
    structures: Annotated[
        list[str] | None,
        typer.Option(
            help="Families that layers may become members of, separated by ';' or ','; may be repeated. "
            "Default: low_rank, monarch, btt, blast(blocks=4)."
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="A text file, or rows (.jsonl, .json, .csv, .parquet) with text, messages, or prompt and completion: "
            "outputs on it are kept. Without it, weights are, which is much worse."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Lines, rows or pieces of the text to calibrate on.")] = 256,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each, at most.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Lines or pieces that are run at once.")] = 16,
    layers: Annotated[
        list[str] | None, typer.Option(help="Globs on the layers' names. Default: all but the output head.")
    ] = None,
    distill: Annotated[float, typer.Option(min=0.0, help="Minutes of training to do what the original does.")] = 0.0,
    lr: Annotated[float, typer.Option(min=0.0, help="Its learning rate.")] = 3e-4,
    sequential: Annotated[
        bool,
        typer.Option("--sequential/--parallel", help="Layers after those that are compressed already, or at once."),
    ] = True,
    only_if_faster: Annotated[
        bool,
        typer.Option(
            "--only-if-faster", help="Leave layers dense that would be slower here, for 1 token or 256 at once."
        ),
    ] = False,
    dtype: Annotated[str, typer.Option(help="Of the parameters: auto, float32, bfloat16, float16.")] = "auto",
    device: Annotated[str, typer.Option(help="That the model runs on: cpu, cuda, ...")] = "cpu",
) -> None:
    """Make a pretrained Hugging Face model smaller.

    Every linear layer gets a structure and a rank of its own, or stays dense: what changes the model's outputs least
    within the budget. After an interruption the same command goes on.
    """
    options = {name: str(value) for name, value in locals().items()}
    require(PRETRAINED)
    import torch
    from transformers.utils import logging

    from einlinear.compression import compress as compress_model
    from einlinear.compression import distill as distill_model
    from einlinear.compression.candidates import DEFAULT
    from einlinear_lab.pretrained.documents import read_documents
    from einlinear_lab.pretrained.pretrained import finish, load, save, text_batches
    from einlinear_lab.pretrained.speed import speeds

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # there is one of our own
    unfinished = out.parent / f"{out.absolute().name}.unfinished"
    with interruptible(f"Interrupted. The same command goes on; so far: {unfinished}"), ExitStack() as held:
        with user_errors():
            budgets = {"params": keep_params, "macs": keep_macs}
            asked = {count: budget for count, budget in budgets.items() if budget is not None}
            if len(asked) != 1:
                raise ValueError("give either --keep-params or --keep-macs: the fraction to keep, such as 0.5")
            ((count, budget),) = asked.items()
            if out.exists() and not unfinished.exists():
                raise ValueError(f"{out} exists: name a folder that does not")
            if Path(model).is_dir() and out.resolve().is_relative_to(Path(model).resolve()):
                raise ValueError(f"--out {out} is inside the model's own folder {model}: name a folder beside it")
            if distill and calibration is None:
                raise ValueError("--distill needs text to train on: --calibration FILE")
            if distill and lr == 0:
                raise ValueError("--lr must be positive: at 0 nothing distills")
            held.enter_context(
                alone_beside(out, f"another einlinear compress is at work on {out}: name another folder")
            )
            if finish(out, unfinished, options):
                display.note(f"{out} is complete: the same command was interrupted after it had been written.")
                return
            if out.exists():
                raise ValueError(f"{out} exists: name a folder that does not")
            found, tokenizer = load(model, dtype, device)
            if distill and found.dtype == torch.float16:
                raise ValueError("float16 cannot be trained: give --dtype float32 or bfloat16 with --distill")
            batches = None
            if calibration is not None:
                documents = read_documents(calibration, tokenizer)
                display.note(f"Calibration: {documents.origin}.")
                batches = text_batches(found, tokenizer, documents, samples, tokens, batch_size)
            # trained, the compressed model needs tensors of its own; else the two share what stays
            shared = {} if distill else {id(tensor): tensor for tensor in (*found.parameters(), *found.buffers())}
            original = copy.deepcopy(found, shared)
            with display.steps() as advance:
                report = compress_model(
                    found,
                    budget,
                    specs(structures) or DEFAULT,
                    batches,
                    count=count,
                    layers=layers,
                    sequential=sequential,
                    only_if_faster=only_if_faster,
                    progress=advance,
                    folder=unfinished,
                )
            if distill and calibration is not None:
                more = text_batches(found, tokenizer, documents, 10**6, tokens, batch_size)
                with display.steps() as advance:
                    distillation = distill_model(
                        found,
                        original,
                        more,
                        steps=10**9,
                        lr=lr,
                        seconds=60 * distill,
                        folder=unfinished / f"distillation of {distill:g} minutes at {lr:g}",
                        progress=lambda done, _, loss: advance("distillation", done, None),
                    )
        with system_errors():
            left = save(found, tokenizer, report, out, model, options)
            shutil.rmtree(unfinished)
    _print(report)
    if distill and calibration is not None:
        first, last = distillation.losses[0], distillation.losses[-1]
        display.note(
            f"Distilled in {len(distillation.losses):,} steps: the loss of a batch was {first:.4f} and is {last:.4f}."
        )
    reads_text = found.main_input_name == "input_ids" and hasattr(found.config, "vocab_size")
    if reads_text and not getattr(found.config, "is_encoder_decoder", False):
        _print_speeds(speeds({"original": original, "compressed": found}))
    if left:
        rest = f" and {len(left) - _SHOWN} more" if left[_SHOWN:] else ""
        display.note(f"Not copied from {model}: {', '.join(left[:_SHOWN])}{rest}.")
    display.note(f"In {out}. from_pretrained loads it after import einlinear.")


def _print(report: CompressionReport) -> None:
    from einlinear.compression.compression_report import HEADINGS

    if report.warning:
        display.note(report.warning)
    display.show(HEADINGS, report.rows())
    for note in report.notes:
        display.note(note)


def _print_speeds(found: dict[str, Speed]) -> None:
    original = found["original"]
    rows = []
    for name, speed in found.items():
        decode = "–" if speed.decode is None else f"{speed.decode:,.0f}"
        rows.append((name, f"{speed.prefill:,.0f}", f"{speed.prefill / original.prefill:.2f}", decode))
    display.show(("", "tokens/s read at once", "times the original's", "generated"), rows)
