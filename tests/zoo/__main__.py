"""``python -m tests.zoo [--write] [kind ...]``: take models through the loop; print their rows or write the page."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import transformers
from tests.zoo.kinds import KINDS
from tests.zoo.loop import run
from tests.zoo.table import problems, row, write


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description="Try every kind of model.")
    parser.add_argument("kinds", nargs="*", metavar="kind", help="names of kinds, such as Llama; all without any")
    parser.add_argument("--write", action="store_true", help="write the tables of docs/results/models.md (all kinds)")
    options = parser.parse_args()
    if unknown := [name for name in options.kinds if name not in KINDS]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(KINDS)}")
    if options.write and options.kinds:
        parser.error("--write is for all kinds")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    kinds = [KINDS[name] for name in options.kinds] or list(KINDS.values())
    with tempfile.TemporaryDirectory() as folder:
        trials = run(
            kinds, Path(folder), lambda text: print(f"{time.perf_counter() - start:5.0f} s  {text}", file=sys.stderr)
        )
    if options.write:
        write(trials)
    else:
        print("\n".join(row(trial) for trial in trials))
    found = problems(trials)
    print("\n".join(found) or f"{len(trials)} kinds, all as expected", file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
