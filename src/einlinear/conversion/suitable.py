"""Which layers of a model could become structured ones, and why others cannot."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from einlinear.conversion.replace import has_hooks, layers_of
from einlinear.conversion.subclasses import difference_to_linear
from einlinear.nn import Linear, MoELinear
from einlinear.nn.factored import Factored
from einlinear.nn.foreign import features, is_conv1d, known
from einlinear.structures import Structure

T = TypeVar("T", bound=Factored)


def linear_layers(model: nn.Module) -> dict[str, Any]:
    """All linear layers, structured ones among them, by every qualified name they have."""
    return layers_of(
        model,
        "el.Linear.from_dense(layer, structure)",
        lambda m: isinstance(m, nn.Linear | Linear | MoELinear) or is_conv1d(m),
    )


def reason_to_skip(module: Any, classes: tuple[type[nn.Module], ...] = ()) -> str | None:
    """Why a linear layer cannot be replaced, whatever by.

    Args:
        module: a linear layer.
        classes: subclasses of `torch.nn.Linear` that are taken for it without a look at what they compute.
    """
    if isinstance(module, Linear | MoELinear):
        return f"is already structured: {module.structure.spec}"
    if is_parametrized(module):
        return (
            "has a parametrization, which would be lost: make it permanent first, with "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    if "weight" not in module._parameters:
        others = ", ".join(module._parameters)
        return (
            f"has a weight that is computed from others ({others}), which would be lost: make it permanent first, with "
            "torch.nn.utils.prune.remove or remove_weight_norm"
        )
    if is_lazy(module.weight):
        return "has no weight yet: call the model once, so that its features are known"
    if type(module.weight) is not nn.Parameter:
        return f"has a weight that is a {type(module.weight).__name__}, as quantised and sharded layers have"
    if has_hooks(module):
        return "has hooks, which would be lost"
    if "forward" in vars(module):
        return "has a forward of its own beside that of its class, which would be lost"
    if type(module) is nn.Linear or is_conv1d(module) or isinstance(module, classes):
        return None
    if difference := difference_to_linear(module):
        name = type(module).__name__
        return f"is a {name}, and no plain nn.Linear: {difference}. classes=[{name}] converts it all the same"
    return None


def owners_of(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """Which modules hold a parameter, by the parameter's id."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name, module))
    return owners


def fused_experts(model: nn.Module) -> dict[str, str]:
    """Why parameters that are the weights of many experts at once are no linear layers, by their qualified names.

    transformers keeps the experts of most mixtures in such a stack, in a module whose class is called something with
    "Experts". There is no module for one of them that could be replaced.
    """
    return {
        f"{name}.{key}": f"is a stack of {len(weight)} weights of a {type(module).__name__}, which is not supported"
        for name, module in model.named_modules()
        if "expert" in type(module).__name__.lower() and known(module) is None
        for key, weight in module.named_parameters(recurse=False)
        if weight.dim() == 3
    }


def structured_like(old: Any, structure: str | Structure, normalize: bool = False, gamma: bool = True) -> Linear:
    """A structured layer of the size, the device, the dtype and the modes of a dense one, with new weights."""
    layer = Linear(*features(old), structure, **_options_of(old), normalize=normalize, gamma=gamma)
    layer.dense_class = type(old)
    return _in_modes_of(old, layer)


def mixture_like(
    old: Any, structure: str | Structure, experts: int, active: int, normalize: bool, gamma: bool
) -> MoELinear:
    """The same as a mixture of experts."""
    options = _options_of(old)
    layer = MoELinear(*features(old), structure, experts, active, **options, normalize=normalize, gamma=gamma)
    return _in_modes_of(old, layer)


def _options_of(old: Any) -> dict[str, Any]:
    return {"bias": old.bias is not None, "device": old.weight.device, "dtype": old.weight.dtype}


def _in_modes_of(old: Any, layer: T) -> T:
    for parameter in layer.parameters():
        parameter.requires_grad_(old.weight.requires_grad)
    if layer.bias is not None:
        layer.bias.requires_grad_(old.bias.requires_grad)
    return layer.train(old.training)
