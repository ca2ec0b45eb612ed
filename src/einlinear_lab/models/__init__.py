"""Reference models with any linear layer structured; each is built from its config."""

from einlinear_lab.models.causal_lm import OPT, OPTConfig, Pythia, PythiaConfig
from einlinear_lab.models.config import ModelConfig, ReferenceModel, Shape
from einlinear_lab.models.reference import GPT, GPTConfig, MLPConfig, ResidualMLP, ViT, ViTConfig

MODELS: dict[str, type[ModelConfig]] = {
    config.NAME: config for config in (MLPConfig, ViTConfig, GPTConfig, OPTConfig, PythiaConfig)
}

__all__ = [
    "GPT",
    "MODELS",
    "OPT",
    "GPTConfig",
    "MLPConfig",
    "ModelConfig",
    "OPTConfig",
    "Pythia",
    "PythiaConfig",
    "ReferenceModel",
    "ResidualMLP",
    "Shape",
    "ViT",
    "ViTConfig",
]
