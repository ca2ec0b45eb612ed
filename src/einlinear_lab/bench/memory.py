"""Peak memory of one call; on the CPU without scratch memory inside a kernel."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from einlinear_lab.bench.timing import Call


def peak_bytes(call: Call, device: str) -> int:
    """Return the most bytes that torch allocates in addition to those before the call."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated()) - before
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with _quiet():
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiler:
                call()
            profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Ev Idx"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return max(accumulate((int(change) for *_, change in changes), initial=0))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence stderr, where the profiler announces itself."""
    stderr = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
