"""Loaded models train like any other: with Trainer, whose checkpoints are folders too, and with LoRA on top."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integrations.transformers.models import make, output, structured
from tests.lab.data.samples import needs
from transformers import BertForSequenceClassification, GPT2LMHeadModel, PreTrainedModel, Trainer, TrainingArguments

import einlinear as el

pytestmark = needs("accelerate")


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 48, (7,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def trainer(model: Any, folder: Path, **options: Any) -> Trainer:
    optimizers = options.pop("optimizers", (None, None))
    arguments = TrainingArguments(
        str(folder),
        max_steps=options.pop("max_steps", 2),
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    return Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows(), optimizers=optimizers)


@pytest.fixture
def loaded(tmp_path: Path) -> PreTrainedModel:
    make("gpt2").save_pretrained(tmp_path / "start")
    model: PreTrainedModel = GPT2LMHeadModel.from_pretrained(tmp_path / "start")
    return model


def test_trainer(
    loaded: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It saves, resumes and loads its best checkpoint without a word about the guards in the files."""
    before = output(loaded)
    options: dict[str, Any] = {"save_steps": 1, "eval_steps": 1, "eval_strategy": "steps", "learning_rate": 1e-2}
    options |= {"load_best_model_at_end": True, "lr_scheduler_type": "constant"}
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING, "transformers"):
        trainer(loaded, tmp_path / "run", **options).train()
        resumed = GPT2LMHeadModel.from_pretrained(tmp_path / "start")
        trainer(resumed, tmp_path / "run", **options | {"max_steps": 3}).train(str(tmp_path / "run" / "checkpoint-2"))
    keys = [record.message for record in caplog.records if "keys" in record.message]
    assert {*keys} == {"There were missing keys in the checkpoint model loaded: ['lm_head.weight']."}  # it is tied
    assert not torch.equal(output(loaded.eval()), before)
    second = GPT2LMHeadModel.from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert structured(second) == structured(loaded)
    assert torch.equal(output(second), output(loaded))  # the best is the last
    third = GPT2LMHeadModel.from_pretrained(tmp_path / "run" / "checkpoint-3")
    assert torch.equal(output(third), output(resumed.eval()))
    assert not torch.equal(output(third), output(second))


def test_learning_rates_keep_their_ratios(loaded: PreTrainedModel, tmp_path: Path) -> None:
    """Trainer's own schedule scales the rate of every group."""
    groups = el.param_groups(loaded, lr=1e-2, base=None)
    rates = [group["lr"] for group in groups]
    assert len({*rates}) > 1
    run = trainer(loaded, tmp_path / "run", optimizers=(torch.optim.AdamW(groups), None), lr_scheduler_type="cosine",
                  max_steps=4, save_strategy="no")  # fmt: skip
    before = output(loaded)
    seen = []
    run.create_scheduler(4)
    assert type(run.lr_scheduler).__name__ == "LambdaLR"
    step = run.optimizer.step
    run.optimizer.step = lambda *a, **k: (seen.append([g["lr"] for g in run.optimizer.param_groups]), step(*a, **k))[1]
    run.train()
    assert len(seen) == 4
    assert len({now[0] for now in seen}) == 4
    for now in seen:
        assert [rate / now[0] for rate in now] == pytest.approx([rate / rates[0] for rate in rates])
    assert not torch.equal(output(loaded.eval()), before)


@needs("peft")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
def test_lora(loaded: PreTrainedModel, tmp_path: Path) -> None:
    import peft

    from einlinear.integrations import peft as lora

    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"])
    before = output(loaded)
    model = peft.get_peft_model(loaded, lora.register(config))
    assert torch.equal(output(model.eval()), before)
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(learning) == 2 * 2 * 2
    assert all("lora_" in name for name in learning)
    trainer(model, tmp_path / "run", learning_rate=1e-1, save_strategy="no").train()
    after = output(model.eval())
    assert not torch.allclose(after, before, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(output(model), before)

    model.save_pretrained(tmp_path / "adapter")
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "start")
    saved = lora.register(peft.LoraConfig.from_pretrained(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", config=saved).eval()
    assert torch.equal(output(again), after)

    with pytest.raises(ValueError, match=r"cannot be merged into a structured layer.*el\.densify"):
        model.merge_and_unload()
    el.densify(model)
    torch.testing.assert_close(output(model), after)
    merged = model.merge_and_unload()
    assert not structured(merged)
    torch.testing.assert_close(output(merged), after)


@needs("peft")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_lora_that_changes_the_weight_is_refused(loaded: PreTrainedModel) -> None:
    import peft

    from einlinear.integrations import peft as lora

    for start in ("pissa", "olora"):
        config = peft.LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights=start)
        with pytest.raises(ValueError, match=f"init_lora_weights='{start}' changes the dense weight"):
            peft.get_peft_model(make("gpt2"), lora.register(config))
    with pytest.raises(ValueError, match="is not supported"):
        peft.get_peft_model(loaded, peft.LoraConfig(r=4, target_modules=["c_attn"]))


@needs("peft")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "opt"])
@pytest.mark.parametrize("target", ["all-linear", "ALL-linear"])
def test_lora_of_all_linear_layers(name: str, target: str, tmp_path: Path) -> None:
    """All but the head, whether dense or structured, as in the dense model."""
    import peft

    from einlinear.integrations import peft as lora

    def targets(model: PreTrainedModel) -> set[str]:
        config = peft.LoraConfig(r=2, target_modules=target, fan_in_fan_out=name == "gpt2")
        tuned = peft.get_peft_model(model, lora.register(config))
        return {n.removesuffix(".lora_A.default") for n, _ in tuned.named_modules() if n.endswith(".lora_A.default")}

    expected = targets(make(name, None))
    assert expected
    assert targets(make(name)) == expected
    half = make(name, layers=["*.0.*"])
    assert 0 < len(structured(half)) < len(expected)
    assert targets(half) == expected


@needs("peft")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_all_linear_leaves_out_a_structured_head() -> None:
    import peft

    from einlinear.integrations import peft as lora

    model = make("llama")
    model.lm_head = el.Linear(32, 48, "btt", bias=False)
    tuned = peft.get_peft_model(model, lora.register(peft.LoraConfig(r=2, target_modules="all-linear")))
    assert type(tuned.base_model.model.lm_head) is el.Linear
    torch.manual_seed(0)
    classifier = BertForSequenceClassification(make("bert", None).config)
    el.convert(classifier, "btt")
    classifier.classifier = el.Linear(32, 2, "btt")
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS")
    tuned = peft.get_peft_model(classifier, lora.register(config))
    assert "classifier" not in tuned.peft_config["default"].target_modules
    assert len(tuned.peft_config["default"].target_modules) > 0


@needs("peft")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.filterwarnings("ignore:You are adding an adapter with `target_modules='all-linear'`")
def test_adapters_of_all_linear_layers_are_saved_loaded_and_stacked(tmp_path: Path) -> None:
    import peft

    from einlinear.integrations import peft as lora

    def config(**options: Any) -> peft.LoraConfig:
        made: peft.LoraConfig = lora.register(peft.LoraConfig(r=2, target_modules="all-linear", **options))
        return made

    model = peft.get_peft_model(make("llama"), config(init_lora_weights=False, use_dora=True)).eval()
    model.add_adapter("second", config(init_lora_weights=False))
    assert model.peft_config["second"].target_modules == model.peft_config["default"].target_modules
    after = output(model)
    assert not torch.allclose(after, output(make("llama")), atol=1e-3)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    saved = lora.register(peft.LoraConfig.from_pretrained(tmp_path))
    again = peft.PeftModel.from_pretrained(make("llama"), tmp_path, config=saved).eval()
    torch.testing.assert_close(output(again), after)


@needs("peft")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_dora_sees_the_matrix_as_it_lies() -> None:
    """Also in a model of Conv1D, of which peft is told that their weights are transposed."""
    import peft

    from einlinear.integrations import peft as lora

    config = peft.LoraConfig(r=2, target_modules=["c_proj"], use_dora=True, fan_in_fan_out=True)
    model = make("gpt2")
    before = output(model)
    model = peft.get_peft_model(model, lora.register(config)).eval()
    torch.testing.assert_close(output(model), before)


@needs("peft")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": r".*\.(q|v)_proj"}, {f"{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"}),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, {"1.self_attn.q_proj"}),
        (
            {"target_modules": "all-linear", "exclude_modules": r".*(self_attn|up_proj|down_proj).*"},
            {"0.mlp.gate_proj", "1.mlp.gate_proj"},
        ),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, {f"{i}.self_attn.q_proj" for i in (0, 1)}),
    ],
)
def test_other_ways_to_name_targets(options: dict[str, Any], expected: set[str]) -> None:
    import peft

    from einlinear.integrations import peft as lora

    model = peft.get_peft_model(make("llama"), lora.register(peft.LoraConfig(r=2, **options)))
    named = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert {name.removeprefix("base_model.model.model.layers.") for name in named} == expected


@needs("peft")
def test_adapters_of_transformers_itself(loaded: PreTrainedModel, tmp_path: Path) -> None:
    """`model.save_pretrained` saves the adapters alone then."""
    import peft

    from einlinear.integrations import peft as lora

    loaded.add_adapter(lora.register(peft.LoraConfig(r=4, target_modules=["c_attn"])))
    loaded.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert not {"config.json", "configuration_einlinear.py"} & {path.name for path in (tmp_path / "adapter").iterdir()}
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4
