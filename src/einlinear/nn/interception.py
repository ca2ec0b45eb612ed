"""Interception of a module's calls: whether more happens in a call than the forward pass of its class."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import parametrizations

from einlinear.nn.linear import Linear

_CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain_layer(module: Any) -> bool:
    """Return whether a module is a structured layer, and a call of it does nothing but multiply."""
    return module is not None and reason_to_call(module) is None and module._compiled_call_impl is None


def reason_to_call(layer: nn.Module) -> str | None:
    """Return why a layer has to be called, since it does more than multiply with its weights, or None."""
    is_structured = isinstance(layer, Linear) and type(layer).multiply is Linear.multiply
    is_structured = is_structured and type(layer).forward is Linear.forward
    if not is_structured or type(layer).__call__ is not nn.Module.__call__ or "forward" in vars(layer):
        return "is not a plain einlinear.Linear"
    return "has hooks" if has_call_hooks(layer) else None


def has_call_hooks(module: nn.Module) -> bool:
    """Return whether hooks run when a module is called, or when its gradients are computed."""
    of_module = (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
    return bool(of_module or _has_any_global_hook())


def has_any_hooks(module: nn.Module) -> bool:
    """Return whether the module has hooks of any kind, on calls or on its state_dict, or its parameters have."""
    of_module = [hooks for name, hooks in vars(module).items() if name.endswith("_hooks")]
    of_parameters = [hooks for p in module.parameters() for hooks in (p._backward_hooks, p._post_accumulate_grad_hooks)]
    hooks = [hook for hooks in (*of_module, *of_parameters) if hooks for hook in hooks.values()]
    # torch's weight norm leaves one behind that reads its old files
    return any(getattr(getattr(hook, "hook", hook), "__module__", "") != parametrizations.__name__ for hook in hooks)


def is_intercepted(module: nn.Module, ignored: tuple[type, ...] = ()) -> bool:
    """Return whether a call of a module, or its gradients, pass through hooks, a compiler or a forward of its own.

    Hooks of the classes `ignored` do not count.
    """
    state = module.__dict__
    if any([state[kind] and not _are_all(state[kind], ignored) for kind in _CALL_HOOKS]):
        return True
    return "forward" in state or state.get("_compiled_call_impl") is not None


def _are_all(hooks: dict[int, Any], classes: tuple[type, ...]) -> bool:
    return all(isinstance(hook, classes) for hook in hooks.values())
