"""Use of a layer's weight: a structured layer saves nothing if the model computes with the weight itself.

Runs of the model show which weights are used outside of their layers. Its source code shows the same, less surely.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache, wraps
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from einlinear.conversion.replacement import linear_layers
from einlinear.nn.lazy_tensor import METADATA, METADATA_NAMES
from einlinear.nn.model_call import Batch, call, evaluating, patched, uncompiled
from einlinear.nn.names import is_of_peft, plain_modules

# by class: layers that are called in a rare case only, and whose weight is read otherwise
_MOSTLY_READ = {"FalconMambaMixer": {"dt_proj"}, "JambaMambaMixer": {"dt_proj"}}
# self.child, up to two attributes of it, and whether the last is assigned
_ATTRIBUTES = re.compile(r"\bself\.(\w+)(?:\.(\w+))?(?:\.(\w+))?( = )?")


def uncalled_layers(model: nn.Module, batches: Iterable[Batch] | None = None) -> dict[int, str]:
    """Return why structured layers would save nothing or break adapters, by the id of the layer to replace.

    The source code answers for layers that the batches do not reach.
    """
    layers = {name: layer for name, layer in linear_layers(model).items() if isinstance(layer.weight, nn.Parameter)}
    called, read = (set[int](), set[int]()) if batches is None else _used_in_runs(model, layers, batches)
    only_read, modules = _only_read_in_source(model), dict(plain_modules(model))
    reasons = {}
    for name, layer in layers.items():
        above, key = _class_above(modules, name), id(layer)
        if key in called & read:
            reasons[key] = f"is called, but {above} also computes with its weight, which would be built every time"
        elif key in read or (key in only_read and key not in called):
            reasons[key] = f"is never called: {above} computes with its weight itself, so nothing would be saved"
    return reasons | _used_by_peft(model)


def _used_by_peft(model: nn.Module) -> dict[int, str]:
    """Return the layers with adapters of peft, whose merge writes to the dense weight, and parts of adapters."""
    reasons: dict[int, str] = {}
    for adapted in (module for module in model.modules() if is_of_peft(module, "BaseTunerLayer")):
        reasons |= {id(part): "is a part of an adapter of peft" for part in adapted.modules()}
        advice = "call merge_and_unload() first, or change the model before get_peft_model"
        base = getattr(adapted, "base_layer", None)
        parts = base.modules() if isinstance(base, nn.Module) else ()
        reasons |= {id(part): f"has adapters of peft, which are merged into its weight: {advice}" for part in parts}
    return reasons


@torch.no_grad()
def _used_in_runs(model: nn.Module, layers: Mapping[str, Any], batches: Iterable[Batch]) -> tuple[set[int], set[int]]:
    """Return the ids of the layers that the model calls, and of those whose weights are used elsewhere."""
    weights = {id(layer): layer.weight for layer in layers.values()}
    recorder = _Recorder(weights.values())
    with ExitStack() as after, evaluating(model), torch.random.fork_rng(devices=[]), uncompiled(), recorder:
        for module in model.modules():
            if owned := recorder.weights & {id(parameter) for parameter in module._parameters.values()}:
                # casting or moving a layer is no computation with its weight
                for name in ("forward", "_apply"):
                    after.enter_context(patched(module, name, recorder.inside_of(module, name, owned)))
        for batch in batches:
            call(model, batch)
    return recorder.called, {key for key, weight in weights.items() if id(weight) in recorder.read}


class _Recorder(TorchFunctionMode):
    """Records the parameters whose values are used outside of their owners; also keeps torch from fused kernels."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.weights = {id(weight) for weight in weights}
        # ids of modules, and of parameters
        self.called, self.read = set[int](), set[int]()
        # the weights of every owner that runs
        self._running: list[set[int]] = []

    def inside_of(self, owner: nn.Module, name: str, owned: set[int]) -> Callable[..., Any]:
        """Return a method of an owner of weights, in which their use is not recorded."""
        method = getattr(owner, name)

        @wraps(method)
        def run(*args: Any, **kwargs: Any) -> Any:
            if name == "forward":
                self.called.add(id(owner))
            self._running.append(owned)
            try:
                return method(*args, **kwargs)
            finally:
                self._running.pop()

        return run

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func not in METADATA:
            used = {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)} & self.weights
            self.read |= used.difference(*self._running)
        return func(*args, **(kwargs or {}))


def _only_read_in_source(model: nn.Module) -> set[int]:
    """Return the ids of modules whose weights are read, and which are never called, by all modules that hold them."""
    read, used = set[int](), set[int]()
    for parent in model.modules():
        cls: Any = type(parent)
        names = set[str]() if "forward" in vars(parent) else _read_children(cls) | _MOSTLY_READ.get(cls.__name__, set())
        for name, child in parent._modules.items():
            (read if name in names else used).add(id(child))
    return read - used


@lru_cache(maxsize=4096)
def _read_children(cls: type) -> frozenset[str]:
    """Return the children of whose weights `forward`, and the methods it calls, use the values and nothing else."""
    methods = _methods(cls)
    if not any("weight" in _names(method.__code__) for method in methods):
        return frozenset()
    try:
        # without comments, and in one layout
        sources = [ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(method)))) for method in methods]
    # there is no source, or it is part of an expression
    except (OSError, SyntaxError):
        return frozenset()
    read, used = set[str](), set[str]()
    for child, first, second, is_assigned in _ATTRIBUTES.findall("\n".join(sources)):
        if first == "weight" and second not in METADATA_NAMES and not is_assigned:
            read.add(child)
        elif first in ("", "forward"):
            used.add(child)
    return frozenset(read - used)


def _methods(cls: type) -> list[Any]:
    """Return `forward` of a class of modules, and all methods that it calls, directly or not."""
    methods: dict[str, list[Any]] = {}
    pending = ["forward"]
    while pending:
        name = pending.pop()
        methods[name] = []
        for base in cls.__mro__:
            method = inspect.unwrap(vars(base).get(name, None)) if base is not nn.Module else None
            if not inspect.isfunction(method):
                continue
            methods[name].append(method)
            names = _names(method.__code__)
            pending += [n for n in names if n not in methods and inspect.isfunction(getattr(cls, n, None))]
            if "super" not in names:
                break
    return [method for inherited in methods.values() for method in inherited]


def _names(code: CodeType) -> set[str]:
    """Return the names of attributes and globals in a function, and in functions defined inside."""
    return set(code.co_names).union(*(_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _class_above(modules: Mapping[str, nn.Module], name: str) -> str:
    """Return the class of the module that computes with a layer's weight, which is no container, unless all are."""
    parts, above = name.split("."), modules[""]
    for depth in range(1, len(parts)):
        owner = modules[".".join(parts[:depth])]
        above = above if type(owner) in (nn.Sequential, nn.ModuleList, nn.ModuleDict) else owner
    return type(above).__name__
