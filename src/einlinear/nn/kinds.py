"""What is known of modules that are not this library's."""

from __future__ import annotations

from torch import nn

_VECTORS = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,
    nn.PReLU,
)


def holds_vectors(module: nn.Module) -> bool:
    """Whether all its own parameters are looked up or multiply elementwise, so that none has a fan-in.

    Every library has norms of its own (LlamaRMSNorm): they are known by their name.
    """
    return isinstance(module, _VECTORS) or type(module).__name__.endswith("Norm")
