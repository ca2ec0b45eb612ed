"""Folders with structured layers in what transformers serves models with: its pipeline and its server."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
import torch
from tests.lab.data.samples import needs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, pipeline

import einlinear as el

PROMPT = "the quick"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with structured layers, and a tokenizer with one token for each byte."""
    path = tmp_path_factory.mktemp("llama")
    tokens = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokens), bos_token_id=None, eos_token_id=0))
    el.convert(model, {"*.self_attn.*": "btt(rank=2)", "*.mlp.*": "low_rank(rank=16)"})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        # printable answers
        model.lm_head.weight[[i for i, token in enumerate(tokens) if not token.isascii() or token == "</s>"]] = 0
    model.save_pretrained(path)
    return path


def dense_answer(folder: Path, count: int) -> str:
    """What the dense model of the same weights adds to the prompt."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    el.densify(model)
    assert not any(isinstance(module, el.Linear) for module in model.modules())
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    answer: str = tokenizer.decode(model.generate(ids, max_new_tokens=count, do_sample=False)[0, ids.shape[1] :])
    assert len({*answer}) > 2
    return answer


def test_pipeline(folder: Path) -> None:
    generator = pipeline("text-generation", str(folder))
    assert sum(isinstance(module, el.Linear) for module in generator.model.modules()) == 14
    (row,) = generator(PROMPT, max_new_tokens=12, do_sample=False)
    assert row["generated_text"] == PROMPT + dense_answer(folder, 12)


@needs("fastapi")
@needs("uvicorn")
@needs("openai")
def test_server(folder: Path, tmp_path: Path) -> None:
    """The server does not import einlinear by itself: the folder's Python file does."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--trust-remote-code"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    environment |= {"PYTHONPATH": str(Path(el.__file__).parent.parent)}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--device", "cpu", "--port", str(port)], stdout=log, stderr=log, env=environment
        )
    try:
        question = {"model": str(folder), "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8}
        request = Request(f"http://localhost:{port}/v1/chat/completions", json.dumps(question).encode())
        request.add_header("Content-Type", "application/json")
        deadline = time.monotonic() + 120
        answer = None
        while answer is None:
            try:
                with urlopen(request, timeout=60) as response:
                    answer = json.load(response)
            except URLError as error:
                log_text = (tmp_path / "log").read_text()
                # it does not listen yet
                assert isinstance(error.reason, ConnectionError), f"{error}\n{log_text}"
                assert server.poll() is None, log_text
                assert time.monotonic() < deadline, log_text
                time.sleep(0.5)
    finally:
        server.kill()
        server.wait()
    assert answer["choices"][0]["message"]["content"] == dense_answer(folder, 8)
