"""Linear layers of a model: which a structured one can replace, or why not; and their replacement in place.

If a model computes with a layer's weight itself, a structured layer saves nothing: its matrix is built in every call.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache, wraps
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from einlinear.nn import Linear, MoELinear
from einlinear.nn.layer_kinds import features, is_conv1d, is_linear, layer_info
from einlinear.nn.lazy_weight import METADATA, METADATA_NAMES
from einlinear.nn.model_call import Batch, call, evaluating, uncompiled
from einlinear.structures import Structure

_PLAIN = {"training", "in_features", "out_features", *vars(nn.Module())}
_differences: dict[Any, str | None] = {}

# by class: layers that are called in a rare case only, and whose weight is read otherwise
_MOSTLY_READ = {"FalconMambaMixer": {"dt_proj"}, "JambaMambaMixer": {"dt_proj"}}
# self.child, up to two attributes of it, and whether the last is assigned
_ATTRIBUTES = re.compile(r"\bself\.(\w+)(?:\.(\w+))?(?:\.(\w+))?( = )?")


def linear_layers(model: nn.Module) -> dict[str, Any]:
    """Return all linear layers, structured ones included, by every qualified name they have."""
    instead = "el.Linear.from_dense(layer, structure)"
    return layers_of(model, instead, lambda module: isinstance(module, Linear | MoELinear) or is_linear(module))


def layers_of(model: nn.Module, instead: str, is_one: Callable[[nn.Module], bool]) -> dict[str, Any]:
    """Return the layers of a kind by every qualified name they have; `instead` is the advice for a bare layer."""
    if is_one(model):
        raise ValueError(f"the model is itself a linear layer, which cannot be replaced in place: use {instead}")
    return {name: module for name, module in model.named_modules(remove_duplicate=False) if is_one(module)}


def fused_experts(model: nn.Module) -> dict[str, str]:
    """Return the reasons why parameters that stack the weights of many experts are skipped, by qualified name."""
    return {
        f"{name}.{key}": f"is a stack of {len(weight)} weights of a {type(module).__name__}, which is not supported"
        for name, module in model.named_modules()
        # transformers keeps the experts of most mixtures in such a class, without a module for one expert
        if "expert" in type(module).__name__.lower() and layer_info(module) is None
        for key, weight in module.named_parameters(recurse=False)
        if weight.dim() == 3
    }


def owners_of(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """Return the modules that hold a parameter, with their names, by the parameter's id."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for _, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append((name, module))
    return owners


def structured_like(old: Any, structure: str | Structure, **config: Any) -> Any:
    """Return a new `Linear`, or `MoELinear` if `config` has "experts", with size, device, dtype and mode of a layer."""
    config |= {"bias": old.bias is not None, "device": old.weight.device, "dtype": old.weight.dtype}
    layer = (MoELinear if "experts" in config else Linear)(*features(old), structure, **config)
    if isinstance(layer, Linear):
        layer.dense_class = type(old)
    layer.requires_grad_(old.weight.requires_grad)
    if layer.bias is not None:
        layer.bias.requires_grad_(old.bias.requires_grad)
    return layer.train(old.training)


def put(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Put new modules into all places of the old ones, by the id of the old."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in new:
                setattr(parent, name, new[id(child)])


def reason_to_skip(module: Any, classes: tuple[type[nn.Module], ...] = ()) -> str | None:
    """Return why no structure can replace a linear layer, or None; `classes` count as linear whatever they compute."""
    if isinstance(module, Linear | MoELinear):
        return f"is already structured: {module.structure.spec}"
    advice = "which would be lost: make it permanent first, with torch.nn.utils."
    if is_parametrized(module):
        return f"has a parametrization, {advice}parametrize.remove_parametrizations"
    if "weight" not in module._parameters:
        others = ", ".join(module._parameters)
        return f"has a weight that is computed from others ({others}), {advice}prune.remove or remove_weight_norm"
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


def has_hooks(module: nn.Module) -> bool:
    """Return whether the module has hooks of any kind, on calls or on its state_dict, or its parameters have."""
    of_module = [hooks for name, hooks in vars(module).items() if name.endswith("_hooks")]
    of_parameters = [hooks for p in module.parameters() for hooks in (p._backward_hooks, p._post_accumulate_grad_hooks)]
    hooks = [hook for hooks in (*of_module, *of_parameters) if hooks for hook in hooks.values()]
    # torch's weight norm leaves one behind that reads its old files
    return any(getattr(getattr(hook, "hook", hook), "__module__", "") != parametrizations.__name__ for hook in hooks)


def difference_to_linear(layer: nn.Linear) -> str | None:
    """Return the difference of a subclass's layer to `torch.nn.Linear`, or None if they compute the same on the CPU."""
    others = [name for name in (*layer._parameters, *layer._buffers, *layer._modules) if name not in ("weight", "bias")]
    if others:
        return f"it has {', '.join(others)} beside weight and bias"
    cls = type(layer)
    if cls.forward is nn.Linear.forward and cls.__call__ is nn.Module.__call__:
        return None
    attributes = sorted((name, text) for name, (_, text) in _attributes(layer).items())
    size = layer.in_features, layer.out_features, layer.bias is not None
    key = cls, cls.forward, cls.__call__, size, tuple(attributes)
    if key not in _differences:
        _differences[key] = _difference(layer)
    return _differences[key]


@torch.no_grad()
def _difference(layer: nn.Linear) -> str | None:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    arguments = list(inspect.signature(type(layer).forward).parameters.values())[1:]
    if len(arguments) != 1 or arguments[0].kind not in positional:
        return "its forward pass takes more than one input"
    training, attributes = layer.training, _attributes(layer)
    try:
        with torch.random.fork_rng(devices=[]):
            x = torch.randn(2, 3, layer.in_features)
            # of rank one, since drawing all entries takes long in large layers
            tensors = {"weight": torch.randn(layer.out_features, 1) * torch.randn(1, layer.in_features)}
            if layer.bias is not None:
                tensors["bias"] = torch.randn(layer.out_features)
            expected = F.linear(x, **tensors)
            for mode in (True, False):
                layer.training = mode
                y = functional_call(layer, tensors, (x,))
                is_alike = type(y) is Tensor and (y.shape, y.dtype) == (expected.shape, expected.dtype)
                if not is_alike or not torch.allclose(y, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())):
                    return "its forward pass computes something else"
    # a forward pass that was written for other weights may raise anything
    except Exception as error:
        return f"its forward pass could not be compared: {type(error).__name__}: {error}"
    finally:
        layer.training = training
    return None if _attributes(layer) == attributes else "its forward pass changes the layer"


def _attributes(layer: nn.Module) -> dict[str, tuple[int, str]]:
    return {name: (id(value), repr(value)) for name, value in vars(layer).items() if name not in _PLAIN}


def uncalled_layers(model: nn.Module, batches: Iterable[Batch] | None = None) -> dict[int, str]:
    """Return the reasons, by the ids of layers, why structured ones would save nothing, from runs on batches or, for
    layers that they do not reach, from the source code."""
    layers = {name: layer for name, layer in linear_layers(model).items() if isinstance(layer.weight, nn.Parameter)}
    called, read = (set[int](), set[int]()) if batches is None else _record(model, layers, batches)
    only_read = _only_read_layers(model)
    reasons = {}
    for name, layer in layers.items():
        above, key = _class_above(model, name), id(layer)
        if key in called & read:
            reasons[key] = f"is called, but {above} also computes with its weight, which would be built every time"
        elif key in read or (key in only_read and key not in called):
            reasons[key] = f"is never called: {above} computes with its weight itself, so nothing would be saved"
    return reasons


def _class_above(model: nn.Module, name: str) -> str:
    """Return the class of the module that computes with a layer's weight, which is no container."""
    above = model
    for part in name.split(".")[:-1]:
        model = model.get_submodule(part)
        above = above if type(model) in (nn.Sequential, nn.ModuleList, nn.ModuleDict) else model
    return type(above).__name__


class _Recorder(TorchFunctionMode):
    """Records the parameters whose values are used outside of their owners; also keeps torch from fused kernels."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.weights = {id(weight) for weight in weights}
        self.inside: list[set[int]] = []
        self.read = set[int]()

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func not in METADATA:
            used = {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)} & self.weights
            self.read |= used.difference(*self.inside)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _record(model: nn.Module, layers: Mapping[str, Any], batches: Iterable[Batch]) -> tuple[set[int], set[int]]:
    """Return the ids of the layers that the model calls, and of those whose weights are used elsewhere."""
    called, weights = set[int](), {id(layer): layer.weight for layer in layers.values()}
    recorder = _Recorder(weights.values())

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

    with ExitStack() as after, evaluating(model), torch.random.fork_rng(devices=[]), uncompiled(), recorder:
        for module in model.modules():
            owned = recorder.weights & {id(parameter) for parameter in module._parameters.values()}
            # casting or moving a layer is no computation with its weight
            for name in ("forward", "_apply") if owned else ():
                after.enter_context(patched(module, name, recorded(module, name, owned)))
        for batch in batches:
            call(model, batch)
    return called, {key for key, weight in weights.items() if id(weight) in recorder.read}


@contextmanager
def patched(module: nn.Module, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Replace a method of one module; other libraries do so as well, and their method is restored."""
    before = vars(module).get(name)
    setattr(module, name, method)
    try:
        yield
    finally:
        if before is None:
            delattr(module, name)
        else:
            setattr(module, name, before)


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
