"""Experts modules of transformers, which stack the weights of all experts in parameters of three dimensions."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from einlinear.conversion.conversion_report import Conversion
from einlinear.conversion.eligibility import attributes_of, reason_of_state
from einlinear.nn import GatedExperts
from einlinear.nn.layer_descriptions import layer_info
from einlinear.nn.moe.gated_experts import active_experts, dense_stacks
from einlinear.nn.names import plain_modules

_WEIGHTS = ("gate_up_proj", "down_proj")
_differences: dict[Any, str | None] = {}


def experts_modules(model: nn.Module) -> dict[str, Any]:
    """Return the modules that stack the weights of experts, structured ones included, by every name they have."""
    return {name: m for name, m in plain_modules(model) if name and _has_stacks(m)}


def _has_stacks(module: nn.Module) -> bool:
    if isinstance(module, GatedExperts):
        return True
    if "expert" not in type(module).__name__.lower() or layer_info(module) is not None:
        return False
    return any(weight.dim() == 3 for weight in module.parameters(recurse=False))


def unsupported_experts(model: nn.Module, where: str) -> dict[str, str]:
    """Return the reason to skip every experts module that is not structured yet, by name; `where` is what skips it."""
    dense = {name: m for name, m in experts_modules(model).items() if not isinstance(m, GatedExperts)}
    return {name: f"{_describe_stack(module)}, which {where}" for name, module in dense.items()}


def reason_to_skip_experts(module: Any) -> str | None:
    """Return why no `GatedExperts` can replace an experts module, or None."""
    if isinstance(module, GatedExperts):
        return f"is already structured: {describe_experts(module)}"
    difference = _difference(module)
    return reason_of_state(module, _WEIGHTS) if difference is None else f"{_describe_stack(module)}: {difference}"


def describe_experts(layer: GatedExperts) -> str:
    """Return the structures of structured experts, stack by stack if they differ."""
    specs = {name: stack.structure.spec for name, stack in layer.stacks().items()}
    if len({*specs.values()}) == 1:
        return f"{layer.experts} experts of {specs['up']}, {layer.active} active"
    named = ", ".join(f"{name}={spec}" for name, spec in specs.items())
    return f"{layer.experts} experts of {named}, {layer.active} active"


@torch.no_grad()
def experts_conversion(name: str, old: Any, layer: GatedExperts, is_projected: bool) -> Conversion:
    """Return the entry in a report of experts that were replaced."""
    experts, in_features, hidden_features = old.down_proj.shape
    entries = 3 * in_features * hidden_features
    per_expert = sum(stack.structure.params for stack in layer.stacks().values())
    macs = sum(stack.active * stack.structure.macs for stack in layer.stacks().values())
    error = None
    if is_projected:
        weights = dense_stacks(old)
        energy = sum(float(weight.float().square().sum()) for weight in weights.values())
        squares = sum(
            float((layer.stacks()[stack].dense_weights().float() - weight.float()).square().sum())
            for stack, weight in weights.items()
        )
        error = (squares / max(energy, torch.finfo(torch.float32).tiny)) ** 0.5
    before = f"{type(old).__name__} {experts} x {in_features} -> {hidden_features}"
    counts = experts * entries, experts * per_expert, active_experts(old) * entries, macs
    return Conversion(name, before, describe_experts(layer), *counts, error)


def densified_experts(name: str, layer: GatedExperts, dense: Any) -> Conversion:
    """Return the entry in a report of structured experts whose class was restored."""
    back = experts_conversion(name, dense, layer, is_projected=False)
    counts = back.params, back.params_before, back.macs, back.macs_before
    return Conversion(name, back.after, back.before, *counts)


def _describe_stack(module: nn.Module) -> str:
    count = next(len(weight) for weight in module.parameters(recurse=False) if weight.dim() == 3)
    return f"is a stack of {count} experts of a {type(module).__name__}"


def _difference(module: Any) -> str | None:
    """Return the difference of an experts module to `GatedExperts`, or None if they compute the same."""
    if missing := [name for name in _WEIGHTS if not isinstance(getattr(module, name, None), Tensor)]:
        return f"it has no {' and no '.join(missing)}"
    tensors = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    others = [*tensors, *(name for name, child in module.named_children() if child is not module.act_fn)]
    if others := [name for name in others if name not in _WEIGHTS]:
        return f"it has {', '.join(others)} beside {' and '.join(_WEIGHTS)}"
    if not callable(getattr(module, "act_fn", None)):
        return "it has no activation called act_fn"
    shapes = tuple(tuple(getattr(module, name).shape) for name in _WEIGHTS)
    experts, in_features, hidden_features = shapes[1]
    if shapes[0] != (experts, 2 * hidden_features, in_features):
        expected = "(experts, 2 * hidden, in) and (experts, in, hidden)"
        return f"its weights have shapes {shapes[0]} and {shapes[1]}, not {expected}"
    ignored = (*_WEIGHTS, "layer_idx")
    key = type(module), shapes, tuple(sorted((n, t) for n, (_, t) in attributes_of(module).items() if n not in ignored))
    if key not in _differences:
        _differences[key] = _difference_in_forward(module, *shapes[1])
    return _differences[key]


@torch.no_grad()
def _difference_in_forward(module: Any, experts: int, in_features: int, hidden_features: int) -> str | None:
    try:
        with torch.random.fork_rng(devices=[]):
            # of rank one and stored as such, since weights of all experts are large
            new: Any = {"device": "cpu", "dtype": torch.float32}
            before, after = (
                torch.randn(experts, 2 * hidden_features, 1, **new),
                torch.randn(experts, in_features, 1, **new),
            )
            # large ones, too: some classes clamp the hidden features
            x = torch.randn(4, in_features, **new) / in_features**0.5
            x[2] *= 30
            count = min(2, experts)
            indices = torch.stack([torch.randperm(experts, device="cpu")[:count] for _ in x])
            weights = torch.rand(4, count, **new)
            probe = copy.copy(module)
            probe.__dict__["_parameters"] = {
                "gate_up_proj": nn.Parameter(before.expand(-1, -1, in_features)),
                "down_proj": nn.Parameter(after.expand(-1, -1, hidden_features)),
            }
            # of grouped and batched implementations, this is the plain one
            y = inspect.unwrap(type(module).forward)(probe, x, indices, weights)
            gate, up = (before[indices, :, 0] * x.sum(1)[:, None, None]).chunk(2, 2)
            hidden = (module.act_fn(gate) * up).sum(2) * weights
            expected = (hidden[..., None] * after[indices, :, 0]).sum(1)
        scale = expected.abs().amax(1, keepdim=True)
        is_alike = isinstance(y, Tensor) and y.shape == expected.shape
        return None if is_alike and bool(((y - expected).abs() <= 1e-3 * scale).all()) else "it computes something else"
    # a forward pass that was written for other arguments may raise anything
    except Exception as error:
        return f"its forward pass could not be compared: {type(error).__name__}: {error}"
