"""Fresh processes: with this library imported first, last, by the folder's own code, or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.integrations.transformers.models import MODELS, make, output
from tests.lab.data.samples import needs
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

import einlinear as el

_PRINT = """
loaded = transformers.{auto}.from_pretrained({folder!r}, **{options!r}).eval()
ids = torch.load({folder!r} + "/ids.pt")
save_file({{"logits": loaded(ids)[0].detach()}}, {folder!r} + "/logits")
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"import torch\nfrom safetensors.torch import save_file\n{code}"],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.parametrize(
    ("imports", "auto"),
    [
        ("from transformers import BertModel\nimport einlinear, transformers", "AutoModelForMaskedLM"),
        # einlinear needs no transformers, and notices when they come
        (
            "import sys; sys.modules['transformers'] = None\nimport einlinear as el\nel.Linear(8, 8, 'btt')\n"
            "del sys.modules['transformers']\nimport einlinear as el\n"
            "assert not [name for name in sys.modules if name.startswith('transformers')]\nimport transformers",
            "BertForMaskedLM",
        ),
    ],
)
def test_imported_first_or_last(imports: str, auto: str, tmp_path: Path) -> None:
    model = make("bert")
    model.save_pretrained(tmp_path)
    ids = torch.randint(3, 48, (2, 7))
    torch.save(ids, tmp_path / "ids.pt")
    done = run(imports + _PRINT.format(auto=auto, folder=str(tmp_path), options={}))
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(tmp_path / "logits")["logits"], model(ids).logits)


def test_registered_on_request(tmp_path: Path) -> None:
    model = make("bert")
    model.save_pretrained(tmp_path)
    ids = torch.randint(3, 48, (2, 7))
    torch.save(ids, tmp_path / "ids.pt")
    loading = _PRINT.format(auto="BertForMaskedLM", folder=str(tmp_path), options={})
    code = f"""
import einlinear, transformers
from einlinear.integrations.transformers import register
try:
    transformers.BertForMaskedLM.from_pretrained({str(tmp_path)!r})
except RuntimeError as error:
    assert "ignore_mismatched_sizes" in str(error), error
else:
    raise AssertionError("it loads without the hooks")
register()
{loading}"""
    done = run(code, EINLINEAR_HOOKS="0")
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(tmp_path / "logits")["logits"], model(ids).logits)


def test_not_imported(tmp_path: Path) -> None:
    """Nothing is loaded then, not even by mistake: a dense layer would start from random weights, so transformers has
    to raise. The code in the folder imports what is needed, where it is trusted."""
    folders = {}
    for name in ("gpt2", "llama", "vit", "bert"):
        folders[name] = str(tmp_path / name)
        (model := make(name)).save_pretrained(folders[name])
    ids = torch.randint(3, 48, (2, 7))
    torch.save(ids, tmp_path / "bert" / "ids.pt")
    classes = {
        "gpt2": ["GPT2Model", "GPT2LMHeadModel", "GPT2ForSequenceClassification", "AutoModelForCausalLM"],
        "llama": ["LlamaModel", "LlamaForCausalLM", "LlamaForSequenceClassification", "AutoModel"],
        "vit": ["ViTModel", "ViTForImageClassification", "AutoModelForImageClassification"],
        "bert": ["BertModel", "BertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification",
                 "BertForQuestionAnswering", "BertForPreTraining", "BertLMHeadModel", "AutoModel",
                 "AutoModelForMaskedLM", "AutoModelForSequenceClassification"],
    }  # fmt: skip
    code = f"""
import sys, transformers
for name, folder in {folders!r}.items():
    for cls in {classes!r}[name]:
        try:
            getattr(transformers, cls).from_pretrained(folder)
        except RuntimeError as error:
            assert "ignore_mismatched_sizes" in str(error), error
            print(cls)
assert "einlinear" not in sys.modules
"""
    trusting = _PRINT.format(auto="AutoModelForMaskedLM", folder=folders["bert"], options={"trust_remote_code": True})
    done = run(code + trusting, HF_HOME=str(tmp_path / "hf"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [cls for name in folders for cls in classes[name]]
    assert torch.equal(load_file(tmp_path / "bert" / "logits")["logits"], model(ids).logits)


@pytest.mark.parametrize("name", MODELS)
def test_the_code_in_the_folder(name: str, tmp_path: Path) -> None:
    """It gives the config that transformers gives, and so the same model."""
    model = make(name)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"] == {"AutoConfig": f"configuration_einlinear.{type(model.config).__name__}"}
    names: dict[str, Any] = {}
    exec((tmp_path / "configuration_einlinear.py").read_text(), names)
    config = names[type(model.config).__name__].from_pretrained(tmp_path)
    assert type(config) is type(model.config)
    assert torch.equal(output(type(model).from_pretrained(tmp_path, config=config)), output(model))


TASK = """
task: five_rows
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
  - metric: brier_score
"""


@pytest.mark.slow
@needs("lm_eval")
def test_lm_eval(tmp_path: Path) -> None:
    """The command, as anyone calls it, finds what the dense model of the same function says."""
    model = make("gpt2")
    model.save_pretrained(tmp_path / "model")
    words = Tokenizer(WordLevel({"unknown": 0, "end": 2, **{f"w{i}": i for i in range(3, 48)}}, unk_token="unknown"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="end", unk_token="unknown")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {"question": f"w{i} w{i + 3}", "choices": [f"w{j + i} w{9 * j}" for j in range(1, 5)], "answer": i % 4}
        for i in range(3, 8)
    ]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "task.yaml").write_text(TASK.format(rows=tmp_path / "rows.json"))
    arguments = {"model": "hf", "model_args": f"pretrained={tmp_path / 'model'},trust_remote_code=True",
                 "tasks": "five_rows", "include_path": tmp_path, "device": "cpu",
                 "output_path": tmp_path / "out"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *(f"--{key}={value}" for key, value in arguments.items())],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "out").rglob("results*.json")
    found = json.loads(results.read_text())["results"]["five_rows"]["brier_score,none"]

    el.densify(model)
    scores = []
    for row in rows:
        said = []
        for choice in row["choices"]:
            ids = tokenizer(f"{row['question']} {choice}", return_tensors="pt")["input_ids"]
            logs = model(ids).logits[0].log_softmax(-1)
            said.append(logs[1, ids[0, 2]] + logs[2, ids[0, 3]])
        wanted = torch.eye(4)[row["answer"]]
        scores.append(float((torch.stack(said).softmax(0) - wanted).square().sum().detach()))
    assert found == pytest.approx(sum(scores) / len(scores), rel=1e-4)
