"""A part of a saved model, such as a tower, an encoder or a body without a head, is loaded as from a dense folder."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.integrations.transformers.models import edit_weights, structured
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    ClapConfig,
    ClapModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionModel,
    Llama4Config,
    Llama4ForConditionalGeneration,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import einlinear as el

_IDS: dict[str, Any] = {"vocab_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
_TEXT: dict[str, Any] = {**_SIZES, **_IDS, "max_position_embeddings": 32, "projection_dim": 16}
_VISION: dict[str, Any] = {**_SIZES, "image_size": 8, "patch_size": 4, "projection_dim": 16}
_PAIRS: dict[str, Any] = {
    **_IDS, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_start_token_id": 1,
}  # fmt: skip
_AUDIO: dict[str, Any] = {
    "hidden_size": 32, "num_mel_bins": 16, "spec_size": 64, "patch_embeds_hidden_size": 8, "depths": [1, 1],
    "num_attention_heads": [1, 2], "window_size": 4,
}  # fmt: skip

WHOLE: dict[str, Callable[[], PreTrainedModel]] = {
    "clip": lambda: CLIPModel(CLIPConfig(text_config=_TEXT, vision_config=_VISION, projection_dim=16)),
    "siglip": lambda: SiglipModel(SiglipConfig(text_config={**_TEXT, "projection_size": 32}, vision_config=_VISION)),
    "clap": lambda: ClapModel(ClapConfig(text_config=_TEXT, audio_config=_AUDIO)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=48, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    ),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**_PAIRS, max_position_embeddings=32)),
    "bert": lambda: BertForMaskedLM(BertConfig(**_TEXT)),
    "whisper": lambda: WhisperForConditionalGeneration(
        WhisperConfig(**_PAIRS, num_mel_bins=8, max_source_positions=16, max_target_positions=16)
    ),
    "wav2vec2": lambda: Wav2Vec2ForCTC(
        Wav2Vec2Config(**_SIZES, vocab_size=48, conv_dim=(32, 32), conv_stride=(2, 2), conv_kernel=(3, 3),
                       num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, num_feat_extract_layers=2)
    ),
    "llama4": lambda: Llama4ForConditionalGeneration(
        Llama4Config(
            text_config={
                **_TEXT, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size_mlp": 64, "num_local_experts": 2
            },
            vision_config={
                **_VISION, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32
            },
        )
    ),
    "llava": lambda: LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config={**_VISION, "model_type": "clip_vision_model"},
            text_config={**_TEXT, "model_type": "llama"},
            image_token_index=47,
        )
    ),
}  # fmt: skip
PARTS = {
    "clip": [
        "CLIPTextModel",
        "CLIPVisionModel",
        "CLIPTextModelWithProjection",
        "CLIPVisionModelWithProjection",
        "CLIPForImageClassification",
        "AutoModel",
    ],
    "siglip": ["SiglipTextModel", "SiglipVisionModel", "SiglipForImageClassification"],
    "clap": ["ClapTextModelWithProjection", "ClapAudioModelWithProjection"],
    "t5": ["T5EncoderModel", "T5Model"],
    "bart": ["BartModel", "BartForCausalLM", "BartForSequenceClassification"],
    "bert": ["BertModel", "BertForSequenceClassification", "BertLMHeadModel"],
    "whisper": ["WhisperModel", "WhisperForAudioClassification", "WhisperForCausalLM"],
    "wav2vec2": ["Wav2Vec2Model", "Wav2Vec2ForSequenceClassification"],
    # of which transformers' auto class makes the text model alone
    "llama4": ["AutoModelForCausalLM", "Llama4ForCausalLM"],
    "llava": ["LlavaModel", "AutoModelForImageTextToText"],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Folders of a model: structured, and made dense. Made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in made:
            torch.manual_seed(0)
            model = WHOLE[name]()
            el.convert(model, "low_rank(rank=3)")
            made[name] = (tmp_path_factory.mktemp(name) / "structured", tmp_path_factory.mktemp(name) / "dense")
            model.save_pretrained(made[name][0])
            dense = copy.deepcopy(model)
            el.densify(dense)
            dense.save_pretrained(made[name][1])
        return made[name]

    return make


def check_equal(model: Any, dense: Any, drawn: set[str]) -> None:
    """All parameters of the dense model are those of the other, but for those that were drawn anew."""
    assert len(structured(model)) > 0
    el.densify(model)
    state = model.state_dict()
    for key, tensor in dense.state_dict().items():
        if key not in drawn:
            torch.testing.assert_close(state[key], tensor, msg=key)


@pytest.mark.parametrize(("name", "part"), [(name, part) for name, parts in PARTS.items() for part in parts])
def test_parts(name: str, part: str, folders: Callable[[str], tuple[Path, Path]]) -> None:
    structured_folder, dense_folder = folders(name)
    load: Any = getattr(transformers, part)
    dense, expected = load.from_pretrained(dense_folder, output_loading_info=True)
    model, info = load.from_pretrained(structured_folder, output_loading_info=True)
    assert info["missing_keys"] == expected["missing_keys"]
    assert not getattr(model.config, "quantization_config", None)
    check_equal(model, dense, {*expected["missing_keys"]})


@pytest.mark.parametrize("part", [CLIPTextModel, CLIPVisionModel])
def test_a_part_is_saved_and_loaded_again(
    part: type[PreTrainedModel], folders: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    model = part.from_pretrained(folders("clip")[0])
    model.save_pretrained(tmp_path)
    again, info = part.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert structured(again) == structured(model)
    check_equal(again, el_dense(model), set())


def el_dense(model: PreTrainedModel) -> PreTrainedModel:
    dense = copy.deepcopy(model)
    el.densify(dense)
    return dense


def test_one_structured_tower(tmp_path: Path) -> None:
    model = WHOLE["clip"]()
    el.convert(model, "btt", layers="vision_model.*")
    model.save_pretrained(tmp_path)
    text, info = CLIPTextModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not structured(text)
    assert len(structured(CLIPVisionModel.from_pretrained(tmp_path))) == len(structured(model))


def test_weights_that_are_missing_are_never_drawn(tmp_path: Path) -> None:
    WHOLE["clip"]().save_pretrained(tmp_path / "dense")
    model = WHOLE["clip"]()
    el.convert(model, "btt")
    model.save_pretrained(tmp_path / "clip")
    edit_weights(tmp_path / "clip", lambda weights: weights.pop("text_model.encoder.layers.0.mlp.fc1.A"))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.fc1\.A of shape .* did not come from the checkpoint"):
        CLIPTextModel.from_pretrained(tmp_path / "clip")
    CLIPVisionModel.from_pretrained(tmp_path / "clip")


def test_a_part_that_no_dense_folder_has_either(folders: Callable[[str], tuple[Path, Path]]) -> None:
    """transformers would draw all of it anew."""
    with pytest.raises(ValueError, match=r"lm_head is described as a structured layer, but lm_head\.A"):
        LlamaForCausalLM.from_pretrained(folders("llava")[0])


def test_the_description_stands_in_the_folder_once(folders: Callable[[str], tuple[Path, Path]]) -> None:
    folder = folders("clip")[0]
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" in config
    assert "quantization_config" not in config["text_config"]
    assert CLIPTextConfig.from_pretrained(folder).quantization_config == config["quantization_config"]
    assert not hasattr(CLIPConfig.from_pretrained(folder).text_config, "quantization_config")
    assert not hasattr(CLIPTextConfig.from_pretrained(folders("clip")[1]), "quantization_config")
