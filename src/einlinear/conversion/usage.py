"""Which linear layers a model never calls, because a module above them computes with their weights itself.

A structured layer in their place would save nothing: its dense matrix would be built again and again. With inputs the
model is run, and what it does with weights is watched. Without, the code of its classes says it.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, wraps
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from einlinear.nn.lazy_weight import METADATA, METADATA_NAMES

Batch = Any  # what a model is called with: a tensor, a sequence of positional arguments, a mapping of named ones


def uncalled_layers(
    model: nn.Module, layers: Mapping[str, Any], batches: Iterable[Batch] | None = None
) -> dict[int, str]:
    """Return the reasons, by the ids of layers, why structured layers in their places would save nothing.

    Args:
        model: whose layers they are, dense.
        layers: linear ones, by qualified name.
        batches: what to run the model on, in evaluation mode and without gradients; None, and for layers that they do
            not reach: what the code of the modules above a layer says.

    Example:
        >>> from torch import nn
        >>> model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2), "head": nn.Linear(16, 4)})
        >>> layers = {"attention.out_proj": model["attention"].out_proj, "head": model["head"]}
        >>> uncalled_layers(model, layers)[id(model["attention"].out_proj)]
        'MultiheadAttention computes with its weight and never calls it: nothing would be saved'
    """
    called, read = (set[int](), set[int]()) if batches is None else _watch(model, layers, batches)
    reasons = {}
    for name, layer in layers.items():
        above = type(model.get_submodule(name.rpartition(".")[0])).__name__
        if id(layer) in called & read:
            reasons[id(layer)] = (
                f"the model calls it, but {above} also computes with its weight, which would be built again and again"
            )
        elif id(layer) in read or (id(layer) not in called and _is_only_read(model, layer)):
            reasons[id(layer)] = f"{above} computes with its weight and never calls it: nothing would be saved"
    return reasons


def call(model: nn.Module, batch: Batch) -> Any:
    """Return the model's output for a batch, which is moved to the model's device."""
    device = next(model.parameters()).device
    if isinstance(batch, Mapping):
        return model(**{name: _to(value, device) for name, value in batch.items()})
    if isinstance(batch, list | tuple):
        return model(*[_to(value, device) for value in batch])
    return model(_to(batch, device))


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Set models to evaluation mode, and every module back to its own mode afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


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

    def watched(module: nn.Module, own: set[int]) -> Callable[..., Any]:
        forward = module.forward

        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            called.add(id(module))
            watch.inside.append(own)
            try:
                return forward(*args, **kwargs)
            finally:
                watch.inside.pop()

        return run

    before = [(module, vars(module).get("forward")) for module, _ in owners]
    for module, own in owners:
        module.forward = watched(module, own)
    try:
        with evaluating(model), watch:
            for batch in batches:
                call(model, batch)
    finally:
        for module, forward in before:
            if forward is None:
                del module.forward
            else:
                module.forward = forward
    return called, {key for key, weight in weights.items() if id(weight) in watch.read}


def _is_only_read(model: nn.Module, layer: nn.Module) -> bool:
    """Whether every module that holds the layer computes with its weight and, by its code, does nothing else with it."""
    places = [(parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is layer]
    return all(name in _only_read(type(parent)) and "forward" not in vars(parent) for parent, name in places)


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
