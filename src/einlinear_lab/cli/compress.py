"""Command `einlinear compress`: a pretrained model in a smaller folder."""

from __future__ import annotations

import copy
import math
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from einlinear.files import check_folder, lock
from einlinear_lab.cli import display
from einlinear_lab.cli.packages import PRETRAINED, require
from einlinear_lab.cli.parsing import parse_bytes, parse_dtype, specs, words

# files that are not copied and are listed
_SHOWN = 10


_Count = Annotated[int, typer.Option(min=1)]
_NonNegative = Annotated[float, typer.Option(min=0.0)]


def compress_command(
    model: Annotated[str, typer.Argument(metavar="MODEL")],
    out: Annotated[Path, typer.Option()],
    budget: Annotated[float, typer.Option(min=0.0, max=1.0)],
    count: str = "params",
    tokens: Annotated[int | None, typer.Option(min=1)] = None,
    structures: list[str] | None = None,
    calibration: Path | None = None,
    samples: _Count = 256,
    max_length: _Count = 256,
    batch_size: _Count = 16,
    layers: list[str] | None = None,
    embeddings: list[str] | None = None,
    distill: _NonNegative = 0.0,
    lr: Annotated[float | None, typer.Option(min=0.0)] = None,
    optimizer: str | None = None,
    match: list[str] | None = None,
    train: str | None = None,
    adapter_rank: Annotated[int | None, typer.Option(min=1)] = None,
    sequential: bool = True,
    only_if_faster: Annotated[bool, typer.Option("--only-if-faster")] = False,
    dtype: str = "auto",
    device: str = "cpu",
    max_memory: str | None = None,
) -> None:
    """Make a pretrained Hugging Face model smaller.

    Each linear layer gets its own structure and rank, or stays dense, so that the model's output changes least within
    the budget. After an interruption the same command resumes.

    Args:
        model: A folder of a transformers model, or its name on the hub.
        out: Folder for the compressed model; from_pretrained loads it.
        budget: Fraction to keep of what --count counts in the layers, such as 0.5.
        count: params; macs, multiply-accumulates; bytes, with weights in 16, 8, 4, 3 or 2 bits; or time, the seconds
            that the layers take on this machine, for --tokens at once.
        tokens: Tokens for which layers are timed: 1 for decoding, or batch size times length. Default: 1 and 256.
        structures: Families of structures to choose from, separated by ';' or ','; may be repeated. Default: low_rank,
            monarch, btt, blast(blocks=4).
        calibration: A text file, or rows (.jsonl, .json, .csv, .parquet) with text, messages, or prompt and completion:
            the text whose outputs are kept. Without it weights are approximated, which is much worse.
        samples: Lines, rows or pieces of the text to calibrate on.
        max_length: Tokens of each, at most.
        batch_size: Lines or pieces that are run at once.
        layers: Globs on the layers' names. Default: all but the output head.
        embeddings: Globs on the names of embeddings to compress as well, with an output head that shares the weight of
            one. Default: none.
        distill: Minutes of training towards the original's outputs. Quantised weights stay as they are.
        lr: Learning rate of --distill. Default: 1e-3 for Muon, 3e-4 for AdamW.
        optimizer: Of --distill: muon, for matrices and factors, with AdamW for the rest; or adamw. Default: muon.
        match: Globs on the modules whose outputs --distill matches, besides the model's, separated by ','; may be
            repeated; or none. Default: the blocks.
        train: What --distill trains: all; structured, only structured layers; or adapters, structured layers, and
            low-rank additions to the dense ones, which are merged into their weights. The last two save memory.
            Default: all.
        adapter_rank: Rank of these additions. Default: 16.
        sequential: Fit each layer on the outputs of the compressed layers before it, or on the original's inputs.
        only_if_faster: Leave layers dense that would be slower here, for --tokens at once.
        dtype: Of the parameters: auto, float32, bfloat16, float16; or fp32, bf16, fp16.
        device: That the model runs on: cpu, cuda, ...
        max_memory: The most memory to hold, such as 2GB, for a model that is larger: on Linux and a CPU, in the dtype
            of its files. Without it, the system decides which weights stay in memory.
    """
    config = {name: str(value) for name, value in locals().items() if name != "max_memory"}
    require(PRETRAINED)
    import torch
    from transformers.utils import logging

    from einlinear import compression
    from einlinear.compression.candidates import DEFAULT_FAMILIES
    from einlinear.compression.distillation import LEARNING_RATES, TRAIN, check_match
    from einlinear.compression.pipeline import budget_kind
    from einlinear_lab.bench.generation_speed import model_speeds
    from einlinear_lab.pretrained.documents import read_documents, text_batches
    from einlinear_lab.pretrained.memory_limit import limited_memory, peak_bytes_of_process, unmapped_weights
    from einlinear_lab.pretrained.model_folder import finish, load, save

    # this command has progress bars of its own
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    unfinished = out.parent / f"{out.absolute().name}.unfinished"
    distillation = None
    with display.interruptible(f"Interrupted. The same command resumes; so far: {unfinished}"), ExitStack() as stack:
        with display.user_errors():
            families = specs(structures) or DEFAULT_FAMILIES
            budget_kind(count, families, tokens, only_if_faster, embeddings or ())
            if train is not None and train not in TRAIN:
                raise ValueError(f"--train must be one of {', '.join(TRAIN)}, not {train!r}")
            if optimizer is not None and optimizer not in LEARNING_RATES:
                raise ValueError(f"--optimizer must be one of {', '.join(LEARNING_RATES)}, not {optimizer!r}")
            if lr is not None and not 0 < lr < math.inf:
                raise ValueError(f"--lr must be a positive number, not {lr:g}")
            of_distillation = {"--lr": lr, "--optimizer": optimizer, "--match": match, "--train": train}
            of_distillation["--adapter-rank"] = adapter_rank
            if not distill and (given := [option for option, value in of_distillation.items() if value is not None]):
                raise ValueError(f"{', '.join(given)} without --distill: give its minutes, as in --distill 10")
            config["dtype"] = parse_dtype(dtype, "--dtype")
            check_folder(out, "--out")
            if out.exists() and not unfinished.exists():
                raise ValueError(f"{out} exists: name a folder that does not")
            if Path(model).is_dir() and out.resolve().is_relative_to(Path(model).resolve()):
                raise ValueError(f"--out {out} is inside the model's own folder {model}: name a folder beside it")
            if distill and calibration is None:
                raise ValueError("--distill needs text to train on: --calibration FILE")
            most = None if max_memory is None else parse_bytes(max_memory, "--max-memory")
            if most is not None and (distill or device != "cpu"):
                reason = "training needs all of a model in memory" if distill else "it limits the memory of the CPU"
                raise ValueError(f"--max-memory goes without --distill and --device: {reason}")
            in_use = f"another einlinear compress is at work on {out}: name another folder"
            lock_file = out.absolute().with_name(f".{out.absolute().name}.lock")
            lock_file.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(lock_file, in_use))
            stack.callback(lock_file.unlink, missing_ok=True)
            if finish(out, unfinished, config):
                display.note(f"{out} is complete: the same command was interrupted after it had been written.")
                return
            if out.exists():
                raise ValueError(f"{out} exists: name a folder that does not")
            if most is not None:
                stack.enter_context(limited_memory(most))
            compressed, tokenizer = load(model, config["dtype"], device)
            if most is not None and (names := unmapped_weights(compressed)):
                wrong = f"--max-memory needs weights that stay in their files, but {names[0]} does not"
                raise ValueError(f"{wrong}: give --dtype auto, and safetensors that from_pretrained does not convert")
            if distill and compressed.dtype == torch.float16:
                raise ValueError("float16 parameters cannot be trained: give --dtype float32 or bfloat16")
            batches = None
            if calibration is not None:
                documents = read_documents(calibration, tokenizer)
                display.note(f"Calibration: {documents.origin}.")
                batches = text_batches(compressed, tokenizer, documents, samples, max_length, batch_size)
            globs = words(",".join(match)) if match else None
            if distill and batches is not None:
                check_match(compressed, globs, batches[0])
            # the two models share tensors, unless one of them is trained
            tensors = () if distill else (*compressed.parameters(), *compressed.buffers())
            original = copy.deepcopy(compressed, {id(tensor): tensor for tensor in tensors})
            options: dict[str, Any] = {"count": count, "tokens": tokens, "layers": layers, "cache_dir": unfinished}
            options |= {"embeddings": embeddings or (), "sequential": sequential, "only_if_faster": only_if_faster}
            with display.steps() as advance:
                report = compression.compress(compressed, budget, families, batches, **options, progress=advance)
            if distill and calibration is not None:
                texts = text_batches(compressed, tokenizer, documents, 10**6, max_length, batch_size)
                optimizer = optimizer or "muon"
                rate = LEARNING_RATES[optimizer] if lr is None else lr
                folder = unfinished / f"distillation of {distill:g} minutes by {optimizer} at {rate:g}"
                options = {"steps": 10**9, "lr": rate, "optimizer": optimizer, "match": globs, "train": train or "all"}
                options |= {"adapter_rank": adapter_rank or 16, "seconds": 60 * distill, "folder": folder}
                with display.steps() as advance:
                    options["progress"] = lambda done, _, loss: advance("distillation", done, None)
                    distillation = compression.distill(compressed, original, texts, **options)
        with display.system_errors():
            left_out = save(compressed, tokenizer, report, out, model, config, shard_bytes=most)
            shutil.rmtree(unfinished)
    if report.warning:
        display.note(report.warning)
    display.show(report.headings, report.rows())
    for note in report.notes:
        display.note(note)
    if distillation is not None:
        losses = distillation.losses
        change = f"the loss of a batch was {losses[0]:.4f} and is {losses[-1]:.4f}"
        display.note(f"Distilled in {len(losses):,} steps: {change}.")
    reads_text = compressed.main_input_name == "input_ids" and hasattr(compressed.config, "vocab_size")
    if most is not None:
        peak = peak_bytes_of_process()
        display.note(f"Peak memory: {peak / 1e9:.2f} GB, of the {most / 1e9:.2f} GB allowed.")
        if peak > most:
            display.note("Memory outside of files takes more than that: give a smaller --batch-size or --max-length.")
    # a model that does not fit is not worth timing
    elif reads_text and not getattr(compressed.config, "is_encoder_decoder", False):
        speeds = model_speeds({"original": original, "compressed": compressed})
        rows = []
        for name, speed in speeds.items():
            decode = "–" if speed.decode is None else f"{speed.decode:,.0f}"
            rows.append((name, f"{speed.prefill:,.0f}", f"{speed.prefill / speeds['original'].prefill:.2f}", decode))
        display.show(("", "prefill, tokens/s", "times the original's", "decode, tokens/s"), rows)
    if left_out:
        rest = f" and {len(left_out) - _SHOWN} more" if left_out[_SHOWN:] else ""
        display.note(f"Not copied from {model}: {', '.join(left_out[:_SHOWN])}{rest}.")
    described = any('"einlinear"' in path.read_text() for path in out.rglob("config.json"))
    display.note(f"Saved in {out}. from_pretrained loads it{' after import einlinear' if described else ''}.")
