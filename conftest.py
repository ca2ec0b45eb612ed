"""Settings of all tests and examples: the same draws on every machine, no deadline on a busy one, and one thread."""

import os
import sys

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

# they import vLLM, which is in an environment of its own
collect_ignore = ["src/einlinear/integrations/vllm.py", "tests/vllm/generate.py", "tests/vllm/bad_input.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run slow tests first, so that no process of pytest is busy with one when the others have nothing left."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Draws that a test does not seed itself are the same in every run."""
    torch.manual_seed(0)
