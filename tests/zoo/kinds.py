"""Kinds of models: for each a tiny one from its config, an example of inputs, and classes that load a part of it.

An entry of a transformers model names its class, the settings that make its config tiny, and its inputs. Nothing is
downloaded; all weights are drawn from a seed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Inputs = Mapping[str, Tensor]
VOCABULARY, TOKENS, WIDTH, HIDDEN = 100, 12, 32, 64
IMAGE, FIRST_WORD = 3, 5  # ids: what stands for a part of an image, and the first that is a word


@dataclass(frozen=True)
class Kind:
    """One kind of model.

    Attributes:
        name: in the table.
        model: the class.
        area: what goes in: text, vision, audio, several inputs, or anything ("torch.nn").
        build: makes the model; its weights depend on torch's seed alone.
        inputs: named arguments of the model. With labels among them it returns a loss.
        parts: classes of transformers that load a part of the saved model, such as a tower.
    """

    name: str
    model: str
    area: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    parts: tuple[str, ...] = ()


def make(kind: Kind, seed: int = 0) -> nn.Module:
    """The model of a kind, without dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind.build().eval()


def inputs_of(kind: Kind, seed: int = 1) -> dict[str, Any]:
    """The same example every time."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind.inputs()


# Inputs


def ids(tokens: int = TOKENS) -> Tensor:
    return torch.randint(FIRST_WORD, VOCABULARY, (2, tokens))


def language() -> dict[str, Any]:
    tokens = ids()
    return {"input_ids": tokens, "labels": tokens}


def words() -> dict[str, Any]:
    return {"input_ids": ids()}


def text_to_text() -> dict[str, Any]:
    return {"input_ids": ids(), "decoder_input_ids": (tokens := ids(8)), "labels": tokens}


def image(size: int = 16) -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def labelled_image() -> dict[str, Any]:
    return {**image(), "labels": torch.tensor([0, 1])}


def image_and_text() -> dict[str, Any]:
    return {**image(), "input_ids": ids(), "return_loss": True}


def image_in_text(places: int) -> dict[str, Any]:
    tokens = torch.cat([torch.full((2, places), IMAGE), ids()], 1)
    return {"input_ids": tokens, "labels": tokens}


def wave() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 400)}


# Configs


IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADS: dict[str, Any] = {"num_attention_heads": 2}
BODY: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": 2, "intermediate_size": HIDDEN, **HEADS}
TEXT: dict[str, Any] = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, **BODY, **IDS}
GROUPED: dict[str, Any] = {**TEXT, "num_key_value_heads": 1}
ENCODER: dict[str, Any] = {**TEXT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
VISION: dict[str, Any] = {"image_size": 16, "patch_size": 8, **BODY}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": HIDDEN, "decoder_ffn_dim": HIDDEN, **IDS,
    "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 16, "d_ff": HIDDEN, "num_layers": 2, "num_heads": 2,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
WAVE: dict[str, Any] = {
    **BODY, "vocab_size": VOCABULARY, "conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 8),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0,
}  # fmt: skip


def hf(name: str, cls: str, area: str, inputs: Callable[[], dict[str, Any]], *parts: str, **config: Any) -> Kind:
    """A model of transformers. A nested dict in its config stands for a config of its own."""

    def build() -> nn.Module:
        of_model: Any = getattr(transformers, cls)
        return of_model(of_model.config_class(**config))

    return Kind(name, cls, area, build, inputs, parts)


TEXT_KINDS = [
    hf("Llama", "LlamaForCausalLM", "text", language, "LlamaModel", **GROUPED),
    hf("Llama, tied", "LlamaForCausalLM", "text", language, "LlamaModel", **GROUPED, tie_word_embeddings=True),
    hf("Mistral", "MistralForCausalLM", "text", language, "MistralModel", **GROUPED),
    hf("Qwen2", "Qwen2ForCausalLM", "text", language, "Qwen2Model", **GROUPED),
    hf("Qwen3", "Qwen3ForCausalLM", "text", language, "Qwen3Model", **GROUPED, head_dim=16),
    hf("Gemma 2", "Gemma2ForCausalLM", "text", language, "Gemma2Model", **GROUPED, head_dim=16),
    hf("Gemma 3", "Gemma3ForCausalLM", "text", language, "Gemma3TextModel", **GROUPED, head_dim=16),
    hf("Phi-3", "Phi3ForCausalLM", "text", language, "Phi3Model", **GROUPED),
    hf("Falcon", "FalconForCausalLM", "text", language, "FalconModel", **TEXT),
    hf("MPT", "MptForCausalLM", "text", language, "MptModel", vocab_size=VOCABULARY, d_model=WIDTH, n_heads=2,
       n_layers=2, max_seq_len=64, **IDS),
    hf("BLOOM", "BloomForCausalLM", "text", language, "BloomModel", vocab_size=VOCABULARY, hidden_size=WIDTH,
       n_layer=2, n_head=2, **IDS),
    hf("OPT", "OPTForCausalLM", "text", language, "OPTModel", **TEXT, ffn_dim=HIDDEN, word_embed_proj_dim=WIDTH),
    hf("GPT-NeoX", "GPTNeoXForCausalLM", "text", language, "GPTNeoXModel", **TEXT),
    hf("GPT-2", "GPT2LMHeadModel", "text", language, "GPT2Model", vocab_size=VOCABULARY, n_positions=64, n_embd=WIDTH,
       n_layer=2, n_head=2, **IDS),
    hf("GPT-J", "GPTJForCausalLM", "text", language, "GPTJModel", vocab_size=VOCABULARY, n_positions=64, n_embd=WIDTH,
       n_layer=2, n_head=2, rotary_dim=8, **IDS),
    hf("OLMo 2", "Olmo2ForCausalLM", "text", language, "Olmo2Model", **GROUPED),
    hf("Mamba", "MambaForCausalLM", "text", language, "MambaModel", vocab_size=VOCABULARY, hidden_size=WIDTH,
       num_hidden_layers=2, state_size=8, **IDS),
    hf("Mamba-2", "Mamba2ForCausalLM", "text", language, "Mamba2Model", vocab_size=VOCABULARY, hidden_size=WIDTH,
       num_hidden_layers=2, state_size=8, num_heads=4, head_dim=16, n_groups=1, chunk_size=8, **IDS),
    hf("Mixtral", "MixtralForCausalLM", "text", language, "MixtralModel", **GROUPED, num_local_experts=4),
    hf("Qwen2-MoE", "Qwen2MoeForCausalLM", "text", language, "Qwen2MoeModel", **GROUPED, **EXPERTS,
       shared_expert_intermediate_size=HIDDEN),
    hf("Qwen3-MoE", "Qwen3MoeForCausalLM", "text", language, "Qwen3MoeModel", **GROUPED, **EXPERTS, head_dim=16),
    hf("DeepSeek-V3", "DeepseekV3ForCausalLM", "text", language, "DeepseekV3Model", **GROUPED | {
       "num_key_value_heads": 2}, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1,
       topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
       v_head_dim=16),
    hf("GPT-OSS", "GptOssForCausalLM", "text", language, "GptOssModel", **GROUPED, num_local_experts=4,
       num_experts_per_tok=2, head_dim=16),
    hf("Jamba", "JambaForCausalLM", "text", language, "JambaModel", **GROUPED, num_experts=2, attn_layer_period=2,
       attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, use_mamba_kernels=False, mamba_d_state=8),
    hf("Falcon-H1", "FalconH1ForCausalLM", "text", language, "FalconH1Model", **GROUPED, mamba_d_ssm=HIDDEN,
       mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8),
    hf("T5", "T5ForConditionalGeneration", "text", text_to_text, "T5EncoderModel", **T5),
    hf("T5, gated", "T5ForConditionalGeneration", "text", text_to_text, "T5EncoderModel", **T5,
       feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    hf("BART", "BartForConditionalGeneration", "text", text_to_text, "BartModel", **SEQ2SEQ),
    hf("Marian", "MarianMTModel", "text", text_to_text, "MarianModel", **SEQ2SEQ, max_position_embeddings=64),
    hf("Switch", "SwitchTransformersForConditionalGeneration", "text", text_to_text, "SwitchTransformersEncoderModel",
       **T5, num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_decoder_layers=2),
    hf("BERT", "BertForMaskedLM", "text", language, "BertModel", **ENCODER),
    hf("RoBERTa", "RobertaForMaskedLM", "text", language, "RobertaModel", **ENCODER),
    hf("ModernBERT", "ModernBertForMaskedLM", "text", language, "ModernBertModel", **TEXT, cls_token_id=1,
       sep_token_id=2),
    hf("DeBERTa-v2", "DebertaV2ForMaskedLM", "text", language, "DebertaV2Model", **ENCODER, relative_attention=True,
       pos_att_type=["p2c", "c2p"], position_buckets=8),
    hf("Electra", "ElectraForPreTraining", "text", words, "ElectraModel", **ENCODER, embedding_size=16),
    hf("ALBERT", "AlbertForMaskedLM", "text", language, "AlbertModel", **ENCODER, embedding_size=16),
    hf("DistilBERT", "DistilBertForMaskedLM", "text", language, "DistilBertModel", vocab_size=VOCABULARY, dim=WIDTH,
       n_layers=2, n_heads=2, hidden_dim=HIDDEN, max_position_embeddings=64, pad_token_id=0),
    hf("MPNet", "MPNetForMaskedLM", "text", language, "MPNetModel", **ENCODER),
    hf("XLNet", "XLNetLMHeadModel", "text", language, "XLNetModel", vocab_size=VOCABULARY, d_model=WIDTH, n_layer=2,
       n_head=2, d_inner=HIDDEN, **IDS),
]  # fmt: skip

# Others that differ from those above in their modules, but not in what their configs call the sizes.
SIZES: dict[str, Any] = {
    **GROUPED, **EXPERTS, "head_dim": 16, "num_local_experts": 4, "n_routed_experts": 4, "n_positions": 64,
    "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "d_model": WIDTH, "ffn_dim": HIDDEN, "n_layers": 2, "n_heads": 2,
    "shared_expert_intermediate_size": WIDTH,
}  # fmt: skip
DECODERS = """
    Afmoe Apertus Arcee AriaText Beam BioGpt BitNet Cohere Cohere2 Cohere2Moe Cwm Doge Emu3 Ernie4_5 Ernie4_5_Moe
    Exaone4 ExaoneMoe FalconMamba FlexOlmo Flint Gemma Glm Glm4 Glm4Moe GPTBigCode GPTNeoXJapanese Granite
    GraniteMoe GraniteMoeShared GraniteSWA Helium HrmText HunYuanDenseV1 HunYuanMoEV1 HYV3 HyperCLOVAX Jais2 JetMoe
    Kolibri1 Laguna Lfm2 Llama4 Mellum MiMoV2Flash MiniMax MiniMaxM2 Ministral ModernBertDecoder Moshi NanoChat
    Nemotron Olmo Olmo3 OlmoHybrid Olmoe Persimmon Phi Phimoe Rwkv SeedOss SmolLM3 SolarOpen StableLm Starcoder2
    VaultGemma XGLM
"""
ENCODERS = """
    BigBird ConvBert Data2VecText Deberta Ernie Esm Esmc EuroBert FNet Gte IBert JinaEmbeddingsV3 LayoutLM Longformer
    MegatronBert MobileBert Mra NomicBert Nystromformer RemBert RobertaPreLayerNorm RoFormer Tapas Ultrabert
    XLMRobertaXL Yoso
"""
BODIES = {"Emu3": "Emu3TextModel", "Llama4": "Llama4TextModel"}  # of the others, the name with "Model" behind it
SEQ2SEQS = "BigBirdPegasus Blenderbot BlenderbotSmall M2M100 MBart Mvp NllbMoe Pegasus PegasusX PLBart"
TEXT_KINDS += [
    hf(n, f"{n}ForCausalLM", "text", language, BODIES.get(n, f"{n}Model"), **SIZES) for n in DECODERS.split()
]
TEXT_KINDS += [
    hf(n, f"{n}ForMaskedLM", "text", language, f"{n}Model", **ENCODER, embedding_size=16) for n in ENCODERS.split()
]
TEXT_KINDS += [
    hf(n, f"{n}ForConditionalGeneration", "text", text_to_text, f"{n}Model", **SEQ2SEQ, max_position_embeddings=64)
    for n in SEQ2SEQS.split()
]
TEXT_KINDS += [
    hf(n, f"{n}ForConditionalGeneration", "text", text_to_text, f"{n}EncoderModel", **T5) for n in ("LongT5", "UMT5")
]

VISION_KINDS = [
    hf("ViT", "ViTForImageClassification", "vision", labelled_image, "ViTModel", **VISION),
    hf("DINOv2", "Dinov2ForImageClassification", "vision", labelled_image, "Dinov2Model", **VISION),
    hf("Swin", "SwinForImageClassification", "vision", labelled_image, "SwinModel", image_size=16, patch_size=2,
       embed_dim=16, depths=(1, 1), num_heads=(2, 2), window_size=4),
    hf("BEiT", "BeitForImageClassification", "vision", labelled_image, "BeitModel", **VISION),
    hf("ConvNeXt", "ConvNextForImageClassification", "vision", labelled_image, "ConvNextModel",
       hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, patch_size=2),
    hf("ResNet", "ResNetForImageClassification", "vision", labelled_image, "ResNetModel", embedding_size=16,
       hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic"),
    hf("SegFormer", "SegformerForImageClassification", "vision", labelled_image, "SegformerModel",
       num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32], num_attention_heads=[1, 2],
       patch_sizes=[3, 3], strides=[2, 2], mlp_ratios=[2, 2], decoder_hidden_size=32),
    hf("DINOv3", "DINOv3ViTModel", "vision", image, **VISION),
    hf("Hiera", "HieraForImageClassification", "vision", labelled_image, "HieraModel", embed_dim=16,
       image_size=[16, 16], patch_size=[3, 3], patch_stride=[2, 2], patch_padding=[1, 1], mlp_ratio=2.0, depths=[1, 1],
       num_heads=[1, 2], embed_dim_multiplier=2.0, num_query_pool=1, query_stride=[2, 2], masked_unit_size=[4, 4],
       masked_unit_attention=[True, False]),
    hf("PVT", "PvtForImageClassification", "vision", labelled_image, "PvtModel", image_size=16,
       num_encoder_blocks=2, depths=[1, 1], sequence_reduction_ratios=[2, 1], hidden_sizes=[16, 32],
       patch_sizes=[4, 2], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], num_labels=2),
    hf("PoolFormer", "PoolFormerForImageClassification", "vision", labelled_image, "PoolFormerModel",
       num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[16, 32], patch_sizes=[3, 3], strides=[2, 2],
       padding=[1, 1], mlp_ratio=2.0),
    hf("VideoMAE", "VideoMAEForVideoClassification", "vision",
       lambda: {"pixel_values": torch.randn(2, 4, 3, 16, 16), "labels": torch.tensor([0, 1])}, "VideoMAEModel",
       **VISION, num_frames=4, decoder_hidden_size=WIDTH),
    hf("TimeSformer", "TimesformerForVideoClassification", "vision",
       lambda: {"pixel_values": torch.randn(2, 4, 3, 16, 16), "labels": torch.tensor([0, 1])}, "TimesformerModel",
       **VISION, num_frames=4),
    hf("DPT", "DPTForDepthEstimation", "vision", image, **VISION | {"num_hidden_layers": 4},
       neck_hidden_sizes=[8, 8, 16, 16],
       fusion_hidden_size=16, backbone_out_indices=[0, 1, 2, 3], is_hybrid=False, readout_type="ignore"),
    hf("YOLOS", "YolosForObjectDetection", "vision", image, "YolosModel", **VISION | {"image_size": [16, 16]},
       num_detection_tokens=4),
    hf("DETR", "DetrForObjectDetection", "vision", lambda: image(32), "DetrModel", use_timm_backbone=False,
       use_pretrained_backbone=False, backbone_config={"model_type": "resnet", "embedding_size": 8,
       "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "out_features": ["stage2"]}, d_model=WIDTH,
       encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
       encoder_ffn_dim=HIDDEN, decoder_ffn_dim=HIDDEN, num_queries=4),
    hf("SAM", "SamModel", "vision",
       lambda: {"pixel_values": torch.randn(1, 3, 32, 32), "input_points": torch.rand(1, 1, 1, 2) * 32},
       vision_config={**BODY, "image_size": 32, "patch_size": 8, "output_channels": 16, "window_size": 2,
                      "global_attn_indexes": [1], "mlp_dim": HIDDEN, "num_pos_feats": 8},
       prompt_encoder_config={"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4},
       mask_decoder_config={"hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                            "iou_head_hidden_dim": 16, "iou_head_depth": 2}),
    hf("ViT-MAE", "ViTMAEForPreTraining", "vision", lambda: {**image(), "noise": torch.rand(2, 4)}, "ViTMAEModel",
       **VISION, decoder_hidden_size=WIDTH,
       decoder_num_attention_heads=2, decoder_num_hidden_layers=1, decoder_intermediate_size=HIDDEN),
]  # fmt: skip

VISION_KINDS += [
    hf(n, f"{n}ForImageClassification", "vision", labelled_image, f"{n}Model", **VISION)
    for n in ("Data2VecVision", "DeiT", "Dinov2WithRegisters", "IJepa", "ViTMSN")
]
VISION_KINDS += [
    hf(n, f"{n}ForImageClassification", "vision", labelled_image, f"{n}Model", image_size=16, patch_size=4,
       embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2)
    for n in ("DonutSwin", "FocalNet", "Swinv2")
]  # fmt: skip
VISION_KINDS += [
    hf(n, f"{n}ForImageClassification", "vision", labelled_image, f"{n}Model", hidden_sizes=[16, 32], depths=[1, 1],
       num_stages=2, patch_size=2, embedding_size=16)
    for n in ("ConvNextV2", "RegNet")
]  # fmt: skip

AUDIO_KINDS = [
    hf("Whisper", "WhisperForConditionalGeneration", "audio", lambda: {"input_features": torch.randn(2, 8, 16),
       "decoder_input_ids": (tokens := ids(8)), "labels": tokens}, "WhisperModel", **SEQ2SEQ,
       num_mel_bins=8, max_source_positions=8, max_target_positions=32, suppress_tokens=None,
       begin_suppress_tokens=None),
    hf("WavLM", "WavLMModel", "audio", wave, **WAVE, num_buckets=8, max_bucket_distance=16),
    hf("Wav2Vec2", "Wav2Vec2ForCTC", "audio", wave, "Wav2Vec2Model", **WAVE),
    hf("HuBERT", "HubertForCTC", "audio", wave, "HubertModel", **WAVE),
    hf("SeamlessM4T", "SeamlessM4TForSpeechToText", "audio",
       lambda: {"input_features": torch.randn(2, 16, 16), "labels": ids(8)}, vocab_size=VOCABULARY, hidden_size=WIDTH,
       encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
       encoder_ffn_dim=HIDDEN, decoder_ffn_dim=HIDDEN, speech_encoder_layers=1, speech_encoder_attention_heads=2,
       speech_encoder_intermediate_size=HIDDEN, feature_projection_input_dim=16, max_source_positions=64,
       num_adapter_layers=1, speech_encoder_layerdrop=0.0, **IDS, decoder_start_token_id=3, max_new_tokens=8),
    hf("Data2VecAudio", "Data2VecAudioForCTC", "audio", wave, "Data2VecAudioModel", **WAVE | {
       "num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 3}),
    hf("UniSpeech-SAT", "UniSpeechSatForCTC", "audio", wave, "UniSpeechSatModel", **WAVE),
    hf("SEW", "SEWForCTC", "audio", wave, "SEWModel", **WAVE, squeeze_factor=2),
    hf("Wav2Vec2-Conformer", "Wav2Vec2ConformerForCTC", "audio", wave, "Wav2Vec2ConformerModel", **WAVE),
    hf("Wav2Vec2-BERT", "Wav2Vec2BertForCTC", "audio", lambda: {"input_features": torch.randn(2, 16, 16)},
       "Wav2Vec2BertModel", **BODY, vocab_size=VOCABULARY, feature_projection_input_dim=16, layerdrop=0.0),
    hf("Speech2Text", "Speech2TextForConditionalGeneration", "audio",
       lambda: {"input_features": torch.randn(2, 16, 8), "decoder_input_ids": (tokens := ids(8)), "labels": tokens},
       "Speech2TextModel", **SEQ2SEQ, input_feat_per_channel=8, conv_channels=16, max_source_positions=32,
       max_target_positions=32),
    hf("Moonshine", "MoonshineForConditionalGeneration", "audio",
       lambda: {"input_values": torch.randn(2, 2000), "decoder_input_ids": (tokens := ids(8)), "labels": tokens},
       "MoonshineModel", vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=HIDDEN,
       encoder_num_hidden_layers=2, decoder_num_hidden_layers=2, encoder_num_attention_heads=2,
       decoder_num_attention_heads=2, **IDS, decoder_start_token_id=1),
    hf("EnCodec", "EncodecModel", "audio", lambda: {"input_values": torch.randn(2, 1, 640)}, num_filters=4,
       hidden_size=16, codebook_dim=16, codebook_size=32, upsampling_ratios=[4, 2], target_bandwidths=[24.0]),
    hf("SpeechT5", "SpeechT5ForSpeechToText", "audio",
       lambda: {"input_values": torch.randn(2, 400), "decoder_input_ids": (tokens := ids(8)), "labels": tokens},
       **{k: v for k, v in WAVE.items() if k not in BODY}, hidden_size=WIDTH, encoder_layers=2, decoder_layers=2,
       encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=HIDDEN, decoder_ffn_dim=HIDDEN,
       max_speech_positions=64, max_text_positions=64, **IDS, decoder_start_token_id=1),
    hf("AST", "ASTForAudioClassification", "audio",
       lambda: {"input_values": torch.randn(2, 16, 16), "labels": torch.tensor([0, 1])}, "ASTModel", **BODY,
       patch_size=8, frequency_stride=8, time_stride=8, max_length=16, num_mel_bins=16),
]  # fmt: skip

_TOWER = {**VISION, "projection_dim": 16}
_CLIP_TEXT = {**TEXT, "projection_dim": 16}
SEVERAL_KINDS = [
    hf("CLIP", "CLIPModel", "several inputs", image_and_text, "CLIPTextModel", "CLIPVisionModel",
       "CLIPTextModelWithProjection", "CLIPVisionModelWithProjection", text_config=_CLIP_TEXT, vision_config=_TOWER,
       projection_dim=16),
    hf("SigLIP", "SiglipModel", "several inputs", image_and_text, "SiglipTextModel", "SiglipVisionModel",
       text_config=TEXT | {"projection_size": WIDTH}, vision_config=VISION),
    hf("LLaVA", "LlavaForConditionalGeneration", "several inputs",
       lambda: {**image_in_text(4), **image()},
       text_config={"model_type": "llama", **GROUPED}, vision_config={"model_type": "clip_vision_model", **_TOWER},
       image_token_index=IMAGE, image_token_id=IMAGE),
    hf("BLIP", "BlipForConditionalGeneration", "several inputs",
       lambda: {**image(), "input_ids": (tokens := ids()), "labels": tokens},
       text_config={**ENCODER, "encoder_hidden_size": WIDTH, "sep_token_id": 2}, vision_config=VISION),
    hf("AltCLIP", "AltCLIPModel", "several inputs", image_and_text,
       text_config={**TEXT, "project_dim": 16}, vision_config=_TOWER, projection_dim=16),
    hf("Chinese-CLIP", "ChineseCLIPModel", "several inputs", image_and_text, "ChineseCLIPVisionModel",
       text_config=ENCODER, vision_config=_TOWER, projection_dim=16),
    hf("CLIPSeg", "CLIPSegForImageSegmentation", "several inputs", lambda: {**image(), "input_ids": ids()},
       "CLIPSegModel", text_config=_CLIP_TEXT, vision_config=_TOWER, projection_dim=16, extract_layers=[0, 1],
       reduce_dim=16, decoder_num_attention_heads=2, decoder_intermediate_size=32),
    hf("OWL-ViT", "OwlViTForObjectDetection", "several inputs", lambda: {**image(), "input_ids": ids()}, "OwlViTModel",
       text_config={**TEXT, "max_position_embeddings": TOKENS}, vision_config=_TOWER, projection_dim=WIDTH),
    hf("GroupViT", "GroupViTModel", "several inputs", image_and_text, "GroupViTTextModel", "GroupViTVisionModel",
       text_config=TEXT, vision_config={**VISION, "depths": [1, 1], "num_group_tokens": [4, 0],
       "num_output_groups": [2, 0], "num_hidden_layers": 2}, projection_dim=16, projection_intermediate_dim=32),
    hf("CLAP", "ClapModel", "several inputs",
       lambda: {"input_ids": ids(), "input_features": torch.randn(2, 1, 32, 16),
                "is_longer": torch.zeros(2, 1, dtype=torch.bool), "return_loss": True},
       text_config={**ENCODER, "projection_dim": 16},
       audio_config={"spec_size": 32, "num_mel_bins": 16, "patch_size": 4, "patch_stride": [4, 4], "window_size": 2,
       "hidden_size": 32, "patch_embeds_hidden_size": 16, "depths": [1, 1], "num_attention_heads": [2, 2],
       "projection_dim": 16, "enable_fusion": False, "num_hidden_layers": 2}, projection_dim=16),
    hf("PaliGemma", "PaliGemmaForConditionalGeneration", "several inputs",
       lambda: {**image_in_text(4), **image(),
                **dict.fromkeys(("token_type_ids", "attention_mask"), torch.ones(2, 4 + TOKENS, dtype=torch.long))},
       text_config={"model_type": "gemma", **GROUPED, "head_dim": 16}, vision_config={
       "model_type": "siglip_vision_model", **VISION}, image_token_index=IMAGE, image_token_id=IMAGE,
       projection_dim=WIDTH),
    hf("Idefics3", "Idefics3ForConditionalGeneration", "several inputs",
       lambda: {**image_in_text(1), "pixel_values": torch.randn(2, 1, 3, 16, 16)},
       text_config={"model_type": "llama", **GROUPED}, vision_config=VISION, image_token_id=IMAGE, scale_factor=2),
    hf("Qwen2-VL", "Qwen2VLForConditionalGeneration", "several inputs",
       lambda: {**(text := image_in_text(4)), "pixel_values": torch.randn(32, 96),
                "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
                "mm_token_type_ids": (text["input_ids"] == IMAGE).long()},
       text_config={**GROUPED, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3],
       "rope_theta": 1e4}},
       vision_config={"depth": 2, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2,
       "patch_size": 4, "temporal_patch_size": 2}, image_token_id=IMAGE, video_token_id=4,
       vision_start_token_id=98, vision_end_token_id=99),
    hf("BLIP-2", "Blip2ForConditionalGeneration", "several inputs",
       lambda: {**image_in_text(2), **image()},
       vision_config=VISION, qformer_config={**ENCODER, "encoder_hidden_size": WIDTH},
       text_config={"model_type": "opt", **TEXT, "ffn_dim": HIDDEN, "word_embed_proj_dim": WIDTH},
       num_query_tokens=2, image_token_index=IMAGE, image_token_id=IMAGE),
    hf("Pix2Struct", "Pix2StructForConditionalGeneration", "several inputs",
       lambda: {"flattened_patches": torch.cat([torch.randint(0, 4, (2, 6, 2)).float(), torch.randn(2, 6, 48)], 2),
                "decoder_input_ids": (tokens := ids(8)), "labels": tokens},
       text_config={"vocab_size": VOCABULARY, "hidden_size": WIDTH, "d_kv": 16, "d_ff": HIDDEN, "num_layers": 2,
       "num_heads": 2, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2},
       vision_config={"hidden_size": WIDTH, "patch_embed_hidden_size": 48, "d_ff": HIDDEN, "d_kv": 16,
       "num_hidden_layers": 2, "num_attention_heads": 2, "seq_len": 16}),
    hf("LayoutLMv3", "LayoutLMv3ForTokenClassification", "several inputs",
       lambda: {**image(), "input_ids": ids(), "bbox": torch.zeros(2, TOKENS, 4, dtype=torch.long)}, "LayoutLMv3Model",
       **ENCODER, input_size=16, patch_size=8, coordinate_size=6, shape_size=4, max_2d_position_embeddings=64,
       rel_pos_bins=8, rel_2d_pos_bins=8),
    hf("VisualBERT", "VisualBertForPreTraining", "several inputs",
       lambda: {"input_ids": ids(), "visual_embeds": torch.randn(2, 4, 16)}, "VisualBertModel", **ENCODER,
       visual_embedding_dim=16),
    hf("LXMERT", "LxmertModel", "several inputs",
       lambda: {"input_ids": ids(), "visual_feats": torch.randn(2, 4, 16), "visual_pos": torch.rand(2, 4, 4)},
       vocab_size=VOCABULARY, hidden_size=WIDTH, num_attention_heads=2, intermediate_size=HIDDEN, l_layers=1,
       x_layers=1, r_layers=1, visual_feat_dim=16, max_position_embeddings=64),
    hf("FLAVA", "FlavaModel", "several inputs", lambda: {**image(), "input_ids": ids()},
       text_config=ENCODER, image_config=VISION, multimodal_config=BODY, projection_dim=16, hidden_size=WIDTH),
    hf("ViLT", "ViltForQuestionAnswering", "several inputs",
       lambda: {**image(), "input_ids": ids(), "labels": torch.rand(2, 2)}, "ViltModel",
       **ENCODER, image_size=16, patch_size=8),
]  # fmt: skip


SERIES_KINDS = [
    hf("PatchTST", "PatchTSTForPrediction", "time series",
       lambda: {"past_values": torch.randn(2, 32, 3), "future_values": torch.randn(2, 8, 3)}, "PatchTSTModel",
       num_input_channels=3, context_length=32, patch_length=8, patch_stride=8, d_model=WIDTH, num_hidden_layers=2,
       num_attention_heads=2, ffn_dim=HIDDEN, prediction_length=8, loss="mse"),
    hf("PatchTSMixer", "PatchTSMixerForPrediction", "time series",
       lambda: {"past_values": torch.randn(2, 32, 3), "future_values": torch.randn(2, 8, 3)}, "PatchTSMixerModel",
       num_input_channels=3, context_length=32, patch_length=8, patch_stride=8, d_model=WIDTH, num_layers=2,
       prediction_length=8, loss="mse"),
    hf("Decision Transformer", "DecisionTransformerModel", "time series",
       lambda: {"states": torch.randn(2, 5, 6), "actions": torch.randn(2, 5, 3), "returns_to_go": torch.randn(2, 5, 1),
                "timesteps": torch.arange(5).repeat(2, 1), "attention_mask": torch.ones(2, 5)},
       state_dim=6, act_dim=3, hidden_size=WIDTH, n_layer=2, n_head=2, max_ep_len=16, n_positions=64, vocab_size=1),
    hf("TimesFM", "TimesFmModelForPrediction", "time series",
       lambda: {"past_values": torch.randn(2, 32), "freq": torch.zeros(2, dtype=torch.long)}, patch_length=8,
       context_length=32,
       horizon_length=8, hidden_size=WIDTH, intermediate_size=HIDDEN, head_dim=16, num_hidden_layers=2,
       num_attention_heads=2, quantiles=[0.5]),
]  # fmt: skip


class Tagger(nn.Module):
    """An LSTM that says something of every token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.lstm = nn.LSTM(WIDTH, HIDDEN, num_layers=2, batch_first=True, bidirectional=True)
        self.hidden = nn.Linear(2 * HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        states, _ = self.lstm(self.embedding(input_ids))
        return self.head(self.hidden(states).relu())


class Named(nn.Module):
    """Gives a module of torch.nn names for its inputs."""

    def __init__(self, model: nn.Module, *names: str) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, **inputs: Tensor) -> Tensor:
        output = self.model(*[inputs[name] for name in self.names])
        return output[0] if isinstance(output, tuple) else output


class Attention(nn.Module):
    """Self-attention between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.attention = nn.MultiheadAttention(HIDDEN, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        return self.down(hidden + self.attention(hidden, hidden, hidden)[0])


def convolutional_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, 10),
    )


def vectors() -> Tensor:
    return torch.randn(2, TOKENS, WIDTH)


TORCH_KINDS = [
    Kind("Transformer encoder", "nn.TransformerEncoder", "torch.nn",
         lambda: Named(nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, HIDDEN, batch_first=True), 2), "x"),
         lambda: {"x": vectors()}),
    Kind("Transformer", "nn.Transformer", "torch.nn",
         lambda: Named(nn.Transformer(WIDTH, 2, 2, 2, HIDDEN, batch_first=True), "source", "target"),
         lambda: {"source": vectors(), "target": vectors()}),
    Kind("Attention", "nn.MultiheadAttention", "torch.nn", Attention, lambda: {"x": vectors()}),
    Kind("LSTM tagger", "nn.LSTM", "torch.nn", Tagger, words),
    Kind("Convolutional net", "nn.Conv2d", "torch.nn", lambda: Named(convolutional_net(), "pixel_values"), image),
]  # fmt: skip

KINDS = {
    kind.name: kind for kind in (*TEXT_KINDS, *VISION_KINDS, *AUDIO_KINDS, *SEVERAL_KINDS, *SERIES_KINDS, *TORCH_KINDS)
}


def takes(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """The inputs that a part of a model takes."""
    parameters = inspect.signature(model.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(inputs)
    return {name: value for name, value in inputs.items() if name in parameters}
