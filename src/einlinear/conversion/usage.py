"""Detection of linear layers that a model never calls, because a module above them computes with their weights itself.

A structured layer in their place would save nothing: its dense matrix would be built again and again. With inputs, the
model is run and its uses of weights are recorded. Without, the source code of its classes is read.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import lru_cache, wraps
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from einlinear.conversion.replacement import linear_layers
from einlinear.nn.lazy_weight import METADATA, METADATA_NAMES
from einlinear.nn.model_call import Batch, call, evaluating

# by class: layers that are called in a rare case only, and whose weight is read otherwise
_MOSTLY_READ = {"FalconMambaMixer": {"dt_proj"}, "JambaMambaMixer": {"dt_proj"}}

# self.child, up to two attributes of it, and whether the last is assigned
_ATTRIBUTES = re.compile(r"\bself\.(\w+)(?:\.(\w+))?(?:\.(\w+))?( = )?")

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def uncalled_layers(model: nn.Module, batches: Iterable[Batch] | None = None) -> dict[int, str]:
    """Return the reasons, by the ids of dense linear layers, why structured ones in their places would save nothing.

    Args:
        model: any module.
        batches: inputs to run the model on, in evaluation mode and without gradients: see `model_call.call`. Without
            them, and for layers that they do not reach, the source code of the modules above a layer decides.

    Example:
        >>> from torch import nn
        >>> model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2), "head": nn.Linear(16, 4)})
        >>> uncalled_layers(model)[id(model["attention"].out_proj)]
        'is never called: MultiheadAttention computes with its weight itself, so nothing would be saved'
    """
    layers = {name: layer for name, layer in linear_layers(model).items() if isinstance(layer.weight, nn.Parameter)}
    called, read = (set[int](), set[int]()) if batches is None else _record(model, layers, batches)
    only_read = _only_read_layers(model)
    reasons = {}
    for name, layer in layers.items():
        above = _class_above(model, name)
        if id(layer) in called & read:
            reasons[id(layer)] = (
                f"is called, but {above} also computes with its weight, which would be built every time"
            )
        elif id(layer) in read or (id(layer) in only_read and id(layer) not in called):
            reasons[id(layer)] = f"is never called: {above} computes with its weight itself, so nothing would be saved"
    return reasons


def _class_above(model: nn.Module, name: str) -> str:
    """Return the class of the module that computes with a layer's weight: containers compute nothing."""
    above = model
    for part in name.split(".")[:-1]:
        model = model.get_submodule(part)
        above = above if type(model) in _CONTAINERS else model
    return type(above).__name__


class _Recorder(TorchFunctionMode):
    """Records the parameters whose values are used outside of the modules that own them.

    A mode also keeps torch's own transformers from handing weights to fused kernels, as structured layers do.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.weights = {id(weight) for weight in weights}
        self.inside: list[set[int]] = []
        self.read = set[int]()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func not in METADATA:
            used = {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)} & self.weights
            self.read |= used.difference(*self.inside)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _record(model: nn.Module, layers: Mapping[str, Any], batches: Iterable[Batch]) -> tuple[set[int], set[int]]:
    """Return the ids of the layers that the model calls, and of those whose weights are used elsewhere."""
    called = set[int]()
    weights = {id(layer): layer.weight for layer in layers.values()}
    recorder = _Recorder(weights.values())
    owners = [
        (module, owned)
        for module in model.modules()
        if (owned := recorder.weights & {id(p) for p in module._parameters.values() if p is not None})
    ]

    def recorded(module: nn.Module, name: str, owned: set[int]) -> Callable[..., Any]:
        method = getattr(module, name)

        @wraps(method)
        def run(*args: Any, **kwargs: Any) -> Any:
            if name == "forward":
                called.add(id(module))
            recorder.inside.append(owned)
            try:
                return method(*args, **kwargs)
            finally:
                recorder.inside.pop()

        return run

    with ExitStack() as after, evaluating(model), torch.random.fork_rng(devices=[]), _uncompiled(), recorder:
        for module, owned in owners:
            # casting or moving a layer is no computation with its weight
            for name in ("forward", "_apply"):
                after.callback(_restore, module, name, vars(module).get(name))
                setattr(module, name, recorded(module, name, owned))
        for batch in batches:
            call(model, batch)
    return called, {key for key, weight in weights.items() if id(weight) in recorder.read}


def _uncompiled() -> AbstractContextManager[object]:
    """Return a context in which compiled code runs eagerly."""
    # importing the compiler takes long: without it nothing is compiled
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _restore(module: nn.Module, name: str, method: Any) -> None:
    if method is None:
        delattr(module, name)
    else:
        setattr(module, name, method)


def _only_read_layers(model: nn.Module) -> set[int]:
    """Return the ids of modules whose weights are read, and which are never called, by all modules that hold them."""
    read, used = set[int](), set[int]()
    for parent in model.modules():
        cls: Any = type(parent)
        names = set[str]() if "forward" in vars(parent) else _only_read(cls) | _MOSTLY_READ.get(cls.__name__, set())
        for name, child in parent._modules.items():
            (read if name in names else used).add(id(child))
    return read - used


@lru_cache(maxsize=4096)
def _only_read(cls: type) -> frozenset[str]:
    """Return the children of whose weights `forward`, and the methods it calls, use the values and nothing else."""
    methods = _methods(cls)
    if not any("weight" in _names(method.__code__) for method in methods):
        return frozenset()
    read, used = set[str](), set[str]()
    for method in methods:
        try:
            # without comments, and in one layout
            source = ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(method))))
        # there is no source, or it is part of an expression
        except (OSError, SyntaxError):
            return frozenset()
        for child, *attributes, is_assigned in _ATTRIBUTES.findall(source):
            first, second = attributes
            if first == "weight":
                if second not in METADATA_NAMES and not is_assigned:
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
            called = (name for name in names if inspect.isfunction(getattr(cls, name, None)))
            pending += [name for name in called if name not in methods]
            if "super" not in names:
                break
    return [method for inherited in methods.values() for method in inherited]


def _names(code: CodeType) -> set[str]:
    """Return the names of attributes and globals in a function, and in functions defined inside."""
    return set(code.co_names).union(*(_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))
