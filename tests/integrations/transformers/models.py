"""Tiny models of transformers, with weights of which none is zero."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

import einlinear as el

_TEXT: dict[str, Any] = {"vocab_size": 48, "max_position_embeddings": 32, "hidden_size": 32, "num_hidden_layers": 2}
_BODY: dict[str, Any] = {"num_attention_heads": 2, "intermediate_size": 64}
_IDS: dict[str, Any] = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertForMaskedLM(BertConfig(**_TEXT, **_BODY)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=48, n_positions=32, n_embd=32, n_layer=2, n_head=2, **_IDS)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(**_TEXT, num_attention_heads=2, ffn_dim=64, word_embed_proj_dim=32, **_IDS)
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_TEXT, **_BODY, **_IDS)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_TEXT, **_BODY, num_key_value_heads=1, **_IDS)),
    "vit": lambda: ViTForImageClassification(
        ViTConfig(image_size=8, patch_size=4, hidden_size=32, num_hidden_layers=2, **_BODY)
    ),
}


def make(name: str, structure: str | None = "btt(rank=2)", **options: Any) -> PreTrainedModel:
    """A model in evaluation, with the layers of its body structured, or dense for None."""
    torch.manual_seed(0)
    model = MODELS[name]()
    if structure is not None:
        el.convert(model, structure, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)  # a bias or a gamma that is lost is noticed
    return model.eval()


def inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator, dtype=model.dtype)}
    return {"input_ids": torch.randint(3, 48, (2, 7), generator=generator)}


@torch.no_grad()
def output(model: PreTrainedModel) -> torch.Tensor:
    """The logits, or the last hidden state of a model without a head."""
    first: torch.Tensor = model(**inputs(model), return_dict=True)[0]
    return first


def structured(model: torch.nn.Module) -> dict[str, str]:
    return {name: layer.structure.spec for name, layer in model.named_modules() if isinstance(layer, el.Linear)}


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the description in config.json; `change` gets it as a dict."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})
