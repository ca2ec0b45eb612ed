"""What a model costs: multiply-accumulates (MACs) and parameters."""

from __future__ import annotations

from torch import nn

from einlinear.nn.third_party import layer_info


def params(model: nn.Module) -> int:
    """The number of parameters, biases and norms included, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def macs_per_token(model: nn.Module, tokens: int | None = None) -> int:
    """Multiply-accumulates that one token, or one vector, takes to pass through every layer of a model once.

    Counted are linear layers (structured ones, torch's, transformers' Conv1D) and the two products of this library's
    attention: 2 * tokens * heads * d_head. Causal attention counts in full, also what its mask hides, as torch's
    FlopCounterMode does it. Biases, norms, activation functions and lookups are not counted.

    Args:
        model: any module whose layers see one token each time; what sees several, such as a layer before a pooling and
            one after it, is counted apart and added up.
        tokens: the length of the sequence, for models with attention.

    Raises:
        ValueError: a module with weights that it does not know, such as `torch.nn.MultiheadAttention`; attention over a
            number of tokens that was not given, or the attention of another library, whose products are in no layer
            that could be counted: see `linear_macs`.

    Example:
        >>> import torch, einlinear as el
        >>> macs_per_token(torch.nn.Sequential(el.Linear(64, 256, "btt"), torch.nn.ReLU(), torch.nn.Linear(256, 10)))
        5632
    """
    macs = 0
    for name, module in model.named_modules():
        macs += _own_macs(name, module)
        info = layer_info(module)
        if info is not None and info.macs_per_position:
            if tokens is None:
                raise ValueError(
                    f"{name or 'the model'} is attention, whose cost depends on the sequence: give tokens="
                )
            macs += tokens * info.macs_per_position
        elif info is None and "attention" in type(module).__name__.lower():
            raise ValueError(
                f"{name or 'the model'} is a {type(module).__name__}: the products of its attention are unknown. "
                "linear_macs counts the linear layers alone"
            )
    return macs


def linear_macs(model: nn.Module) -> int:
    """Multiply-accumulates that one token takes in all linear layers of a model, of whatever library.

    Raises:
        ValueError: a module with weights that it does not know, such as `torch.nn.MultiheadAttention`.

    Example:
        >>> import torch
        >>> linear_macs(torch.nn.TransformerEncoderLayer(8, 2).linear1)
        16384
    """
    return sum(_own_macs(name, module) for name, module in model.named_modules())


def _own_macs(name: str, module: nn.Module) -> int:
    """Of a module without its children, and of one token by itself."""
    info = layer_info(module)
    counted = {*info.roles} if info is not None and info.macs is not None else set()
    unknown = sorted(key for key, p in module.named_parameters(recurse=False) if p.dim() > 1 and key not in counted)
    if unknown:
        raise ValueError(
            f"the MACs of {name or 'the model'}, a {type(module).__name__}, are unknown: it has weights of its own, "
            f"{', '.join(unknown)}"
        )
    return info.macs or 0 if info is not None else 0
