"""What a model costs: multiply-accumulates (MACs) and parameters."""

from __future__ import annotations

from torch import nn

from einlinear.nn.blocks import Attention
from einlinear.nn.kinds import holds_vectors
from einlinear.nn.linear import Linear, features, is_conv1d


def params(model: nn.Module) -> int:
    """The number of parameters, biases and norms included, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def macs_per_token(model: nn.Module, tokens: int | None = None) -> int:
    """Multiply-accumulates that one token, or one vector, takes to pass through every layer of a model once.

    Counted are linear layers (structured ones, torch's, transformers' Conv1D) and the two products of `Attention`:
    2 * tokens * heads * d_head. Causal attention counts in full, also what its mask hides, as torch's FlopCounterMode
    does it. Biases, norms, activation functions and lookups are not counted.

    Args:
        model: any module whose layers see one token each time; what sees several, such as a layer before a pooling and
            one after it, is counted apart and added up.
        tokens: the length of the sequence, for models with attention.

    Raises:
        ValueError: a module with weights that it does not know, such as `torch.nn.MultiheadAttention`; attention over a
            number of tokens that was not given.

    Example:
        >>> import torch, einlinear as el
        >>> macs_per_token(torch.nn.Sequential(el.Linear(64, 256, "btt"), torch.nn.ReLU(), torch.nn.Linear(256, 10)))
        5632
    """
    return sum(_own_macs(name, module, tokens) for name, module in model.named_modules())


def _own_macs(name: str, module: nn.Module, tokens: int | None) -> int:
    """Of a module without its children."""
    weights = {key for key, p in module.named_parameters(recurse=False) if p.dim() > 1}
    macs, known = 0, set[str]()
    if isinstance(module, Linear):
        macs, known = module.structure.macs, {factor.name for factor in module.structure.factors}
    elif isinstance(module, nn.Linear) or is_conv1d(module):
        fan_in, fan_out = features(module)
        macs, known = fan_in * fan_out, {"weight"}
    elif isinstance(module, Attention):
        if tokens is None:
            raise ValueError(f"{name or 'the model'} is attention, whose cost depends on the sequence: give tokens=")
        macs = 2 * tokens * module.features
    elif holds_vectors(module):
        known = weights
    if weights - known:
        raise ValueError(
            f"the MACs of {name or 'the model'}, a {type(module).__name__}, are unknown: it has weights of its own, "
            f"{', '.join(sorted(weights - known))}"
        )
    return macs
