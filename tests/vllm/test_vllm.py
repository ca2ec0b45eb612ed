"""The real vLLM, in an environment of its own (`make test-vllm`), serves folders that `save_pretrained` wrote."""

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import einlinear as el

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MODELS = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig),
    # with biases of queries, keys and values
    "qwen": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config),
}
# a structure for each block, and in the last one parts of merged layers that differ
STRUCTURES = {
    "model.layers.0.*": "low_rank(rank=16)",
    "model.layers.1.*": "btt(rank=2)",
    "model.layers.2.*": "monarch(blocks=4)",
    "*.q_proj": "btt",
    "*.v_proj": "low_rank(rank=8)",
    "*.gate_proj": "dyad",
    "*.down_proj": "kronecker",
    "lm_head": "low_rank(rank=24)",
}


@pytest.fixture(scope="module", autouse=True)
def environment() -> None:
    if PYTHON.exists():
        return
    missing = "vLLM is not installed in .venv-vllm: run  make test-vllm"
    if os.environ.get("CI") == "true":
        pytest.fail(missing)
    pytest.skip(missing)


def saved(name: str, path: Path) -> Path:
    torch.manual_seed(0)
    model_class, config_class = MODELS[name]
    model = model_class(config_class(**SIZES))
    el.convert(model, STRUCTURES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        # log-probabilities far from uniform
        model.lm_head.B.mul_(20)
    model.eval().save_pretrained(path)
    return path


@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    folder = saved(name, tmp_path)
    results = json.loads(run("generate.py", folder).splitlines()[-1])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert len(results) == 3
    for result in results:
        prompt, tokens = result["prompt"], result["tokens"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert len(tokens) == 64
        torch.testing.assert_close(torch.tensor(result["log_probabilities"]), expected, atol=2e-5, rtol=1e-5)
        # the distribution is not so flat that anything would do
        assert float(logits.softmax(-1).max(-1).values.mean()) > 3 / SIZES["vocab_size"]


def test_server_answers(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    with served(folder) as address:
        body = {"model": str(folder), "prompt": [1, 2, 3], "max_tokens": 8, "temperature": 0, "return_token_ids": True}
        request = urllib.request.Request(
            f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            answer = json.load(response)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 3:]
    assert answer["choices"][0]["token_ids"] == tokens.tolist()


def test_errors_name_the_layer() -> None:
    messages = json.loads(run("bad_input.py").splitlines()[-1])
    assert messages["devices"] == "down cannot be split over devices by vLLM: start it with tensor_parallel_size=1"
    assert messages["sizes"] == "down is described with 16 -> 32 features, but vLLM's layer has 16 -> 48"
    assert messages["shape"] == (
        "gate.A has the shape (3, 16) in the folder, but (4, 16) for the structure in config.json"
    )
    assert messages["dense weight"] == "gate is described as structured, but the folder has a weight for it"
    assert messages["embedding"].startswith("wte is a structured embedding, which vLLM cannot load: make it dense")
    assert "down has no in_features, out_features, bias" in messages["entry"]


def run(script: str, *arguments: object) -> str:
    command = [PYTHON, Path(__file__).with_name(script), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=variables(), timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def variables() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Run the server on a free port of this machine, and yield its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "128"]
    # what `vllm serve` runs: that command looks for a package named vllm, which the build for CPUs is not
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, *options]
    command += ["--skip-tokenizer-init", "--enforce-eager"]
    log = folder / "serve.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=variables())
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 600
        while time.monotonic() < end and process.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
                break
            time.sleep(1)
        else:
            raise AssertionError(f"vllm serve did not start:\n{log.read_text()[-4000:]}")
        yield address
    finally:
        process.terminate()
        process.wait(timeout=60)
