"""Which linear layers a model never calls, because a module above them computes with their weights itself.

A structured layer in their place would save nothing: its dense matrix would be built again and again. With inputs the
model is run, and what it does with weights is watched. Without, the code of its classes says it.
"""

from __future__ import annotations

import ast
import inspect
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

from einlinear.conversion.calling import Batch, call, evaluating
from einlinear.conversion.suitable import linear_layers
from einlinear.nn.lazy_weight import METADATA, METADATA_NAMES

# by class: layers that are called in one case, but not in that of most users, in which their weight is read
_MOSTLY_READ = {"FalconMambaMixer": {"dt_proj"}, "JambaMambaMixer": {"dt_proj"}}

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def uncalled_layers(model: nn.Module, batches: Iterable[Batch] | None = None) -> dict[int, str]:
    """Return the reasons, by the ids of dense linear layers, why structured ones in their places would save nothing.

    Args:
        model: any module.
        batches: what to run the model on, in evaluation mode and without gradients: see `calling.call`. Without them,
            and for layers that they do not reach, it is the code of the modules above a layer that tells.

    Example:
        >>> from torch import nn
        >>> model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2), "head": nn.Linear(16, 4)})
        >>> uncalled_layers(model)[id(model["attention"].out_proj)]
        'is never called: MultiheadAttention computes with its weight itself, so nothing would be saved'
    """
    layers = {name: layer for name, layer in linear_layers(model).items() if isinstance(layer.weight, nn.Parameter)}
    called, read = (set[int](), set[int]()) if batches is None else _watch(model, layers, batches)
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
    """The class of the module that computes with what a layer holds: containers compute nothing."""
    above = model
    for part in name.split(".")[:-1]:
        model = model.get_submodule(part)
        above = above if type(model) in _CONTAINERS else model
    return type(above).__name__


class _Watch(TorchFunctionMode):
    """Notes the parameters whose values are used outside of the modules that own them.

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
def _watch(model: nn.Module, layers: Mapping[str, Any], batches: Iterable[Batch]) -> tuple[set[int], set[int]]:
    """The ids of the layers that the model calls, and of those whose weights it computes with elsewhere."""
    called = set[int]()
    weights = {id(layer): layer.weight for layer in layers.values()}
    watch = _Watch(weights.values())
    owners = [
        (module, own)
        for module in model.modules()
        if (own := watch.weights & {id(p) for p in module._parameters.values() if p is not None})
    ]

    def watched(module: nn.Module, name: str, own: set[int]) -> Callable[..., Any]:
        method = getattr(module, name)

        @wraps(method)
        def run(*args: Any, **kwargs: Any) -> Any:
            if name == "forward":
                called.add(id(module))
            watch.inside.append(own)
            try:
                return method(*args, **kwargs)
            finally:
                watch.inside.pop()

        return run

    with ExitStack() as after, evaluating(model), torch.random.fork_rng(devices=[]), _uncompiled(), watch:
        for module, own in owners:
            for name in ("forward", "_apply"):  # casting a layer or moving it is no computing with its weight
                after.callback(_restore, module, name, vars(module).get(name))
                setattr(module, name, watched(module, name, own))
        for batch in batches:
            call(model, batch)
    return called, {key for key, weight in weights.items() if id(weight) in watch.read}


def _uncompiled() -> AbstractContextManager[object]:
    """What is compiled runs as it was written."""
    # importing the compiler takes long: without it nothing is compiled
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _restore(module: nn.Module, name: str, before: Any) -> None:
    if before is None:
        delattr(module, name)
    else:
        setattr(module, name, before)


def _only_read_layers(model: nn.Module) -> set[int]:
    """The ids of modules with whose weights the code of every module that holds them computes, and does no more."""
    read, used = set[int](), set[int]()
    for parent in model.modules():
        cls: Any = type(parent)
        names = set[str]() if "forward" in vars(parent) else _only_read(cls) | _MOSTLY_READ.get(cls.__name__, set())
        for name, child in parent._modules.items():
            (read if name in names else used).add(id(child))
    return read - used


@lru_cache(maxsize=4096)
def _only_read(cls: type) -> frozenset[str]:
    """The children of whose weights `forward`, and the methods that it calls, use the values and nothing else."""
    methods = _methods(cls)
    if not any("weight" in _names(method.__code__) for method in methods):
        return frozenset()
    finder = _Finder()
    for method in methods:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
        except (OSError, SyntaxError):  # there is no source, or it is part of an expression
            return frozenset()
        finder.look(tree)
    return frozenset(finder.read - finder.used)


def _methods(cls: type) -> list[Any]:
    """`forward` of a class of modules, and the methods that are called from there."""
    found: dict[str, list[Any]] = {}
    left = ["forward"]
    while left:
        name = left.pop()
        found[name] = []
        for base in cls.__mro__:
            method = inspect.unwrap(vars(base).get(name, None)) if base is not nn.Module else None
            if not inspect.isfunction(method):
                continue
            found[name].append(method)
            names = _names(method.__code__)
            left += [other for other in names if other not in found and inspect.isfunction(getattr(cls, other, None))]
            if "super" not in names:
                break
    return [method for methods in found.values() for method in methods]


def _names(code: CodeType) -> set[str]:
    """The names of attributes and globals in a function, and in those defined inside."""
    return set(code.co_names).union(*(_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


class _Finder(ast.NodeVisitor):
    """What methods do with the attributes of `self`.

    Attributes:
        read: the children whose `weight` is used for its values.
        used: those that are called, or handed to others.
    """

    def __init__(self) -> None:
        self.read, self.used = set[str](), set[str]()
        self.own = ""

    def look(self, tree: ast.Module) -> None:
        (method,) = tree.body
        assert isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef)
        self.own = method.args.args[0].arg if method.args.args else ""
        self.generic_visit(method)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        chain: list[str] = []
        inner: ast.expr = node
        while isinstance(inner, ast.Attribute):
            chain.insert(0, inner.attr)
            inner = inner.value
        if not isinstance(inner, ast.Name) or inner.id != self.own:
            self.generic_visit(node)
        elif chain[1:2] == ["weight"]:
            if not METADATA_NAMES.intersection(chain[2:3]) and isinstance(node.ctx, ast.Load):
                self.read.add(chain[0])
        elif len(chain) == 1 or chain[1] == "forward":
            self.used.add(chain[0])
