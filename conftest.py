"""Settings of all tests and examples: the same draws on every machine, no deadline on a busy one, and one thread."""

import os
import sys
from itertools import chain, groupby

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")

# Models this small run slower on several threads, and far slower on a busy machine. Processes that tests start as well.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# Processes that tests start would compile the sources again, each for half a second.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# No test cuts the power, and some would wait for the disk a third of their time.
os.fsync = lambda number: None

# they import vLLM, which is in an environment of its own
collect_ignore = ["src/einlinear/integrations/vllm.py", "tests/vllm/generate.py", "tests/vllm/bad_input.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run slow tests first, so that no process of pytest is busy with one when the others have nothing left.

    Each process gets a share of successive tests, which begins with the slow tests of some of the files.
    """
    slow = [item for item in items if item.get_closest_marker("slow")]
    quick = [item for item in items if not item.get_closest_marker("slow")]
    files = [list(tests) for _, tests in groupby(slow, lambda item: item.path)]
    processes, order = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")), list[pytest.Item]()
    for i in range(processes):
        # pytest-xdist divides the tests like this
        size = (len(items) - len(order)) // (processes - i)
        own = list(chain.from_iterable(files[i::processes]))
        count = max(0, size - len(own))
        order += own + quick[:count]
        quick = quick[count:]
    items[:] = order + quick


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Draws that a test does not seed itself are the same in every run."""
    torch.manual_seed(0)
