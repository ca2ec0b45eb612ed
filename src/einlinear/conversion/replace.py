"""Finding the linear layers of a model, and putting others in their places."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.utils import parametrizations

from einlinear.conversion.conversion_report import Conversion, ConversionReport
from einlinear.nn.foreign import features


def layers_of(model: nn.Module, instead: str, is_one: Callable[[nn.Module], bool]) -> dict[str, Any]:
    """The layers of a kind, by every qualified name they have."""
    if is_one(model):
        raise ValueError(f"the model is itself a linear layer, which cannot be replaced in place: use {instead}")
    return {name: module for name, module in model.named_modules(remove_duplicate=False) if is_one(module)}


def has_hooks(module: nn.Module) -> bool:
    """Whether the module has hooks of any kind, on calls or on its state_dict, or its parameters have."""
    of_module = [hooks for name, hooks in vars(module).items() if name.endswith("_hooks")]
    of_parameters = [hooks for p in module.parameters() for hooks in (p._backward_hooks, p._post_accumulate_grad_hooks)]
    hooks = [hook for hooks in (*of_module, *of_parameters) if hooks for hook in hooks.values()]
    # torch's weight norm leaves one behind that reads its old files
    return any(getattr(getattr(hook, "hook", hook), "__module__", "") != parametrizations.__name__ for hook in hooks)


def replace_in(
    model: nn.Module,
    new: Mapping[int, nn.Module],
    converted: Sequence[Conversion],
    skipped: Sequence[tuple[str, str]],
    otherwise: str,
) -> ConversionReport:
    """Put the new modules into the model. If there are none it is an error, for the reasons found or for another."""
    if not converted:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped) or otherwise
        raise ValueError(f"no layer could be converted: {reasons}")
    put(model, new)
    return ConversionReport(tuple(converted), tuple(skipped))


def put(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Put new modules into all the places of old ones, of which the id is given."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in new:
                setattr(parent, name, new[id(child)])


def describe(module: nn.Module) -> str:
    return "{} {} -> {}".format(type(module).__name__, *features(module))
