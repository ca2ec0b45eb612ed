"""Multiply-accumulates (MACs) and parameters of a model; of one structure, `Structure` counts them."""

from __future__ import annotations

from torch import nn

from einlinear.nn.layer_descriptions import layer_info


def params(model: nn.Module) -> int:
    """Return the number of parameters, biases and norms included; shared parameters count once."""
    return sum(p.numel() for p in model.parameters())


def macs_per_token(model: nn.Module, tokens: int | None = None) -> int:
    """Return the multiply-accumulates of one token, or one vector, through every layer of a model.

    Linear layers (structured ones, torch's, transformers' Conv1D) and the two products of attention count, causal
    attention in full, as in torch's FlopCounterMode. Biases, norms, activation functions and lookups do not count.

    Args:
        model: any module each of whose layers is applied once per token.
        tokens: length of the sequence, for models with attention.

    Raises:
        ValueError: a module with unknown weights, such as `torch.nn.MultiheadAttention`; attention without `tokens`;
            attention of another library, see `linear_macs`.

    Example:
        >>> import torch, einlinear as el
        >>> macs_per_token(torch.nn.Sequential(el.Linear(64, 256, "btt"), torch.nn.ReLU(), torch.nn.Linear(256, 10)))
        5632
    """
    macs = 0
    for name, module in model.named_modules():
        macs += _module_macs(name, module)
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
    """Return the multiply-accumulates of one token in the linear layers of any model; errors as of `macs_per_token`.

    Example:
        >>> import torch
        >>> linear_macs(torch.nn.TransformerEncoderLayer(8, 2).linear1)
        16384
    """
    return sum(_module_macs(name, module) for name, module in model.named_modules())


def _module_macs(name: str, module: nn.Module) -> int:
    """Return the MACs of a module without its children, for one token."""
    info = layer_info(module)
    counted = {*info.roles} if info is not None and info.macs is not None else set()
    unknown = sorted(key for key, p in module.named_parameters(recurse=False) if p.dim() > 1 and key not in counted)
    if unknown:
        raise ValueError(
            f"the MACs of {name or 'the model'}, a {type(module).__name__}, are unknown: it has weights of its own, "
            f"{', '.join(unknown)}"
        )
    return info.macs or 0 if info is not None else 0
