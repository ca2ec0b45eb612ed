"""Styles of transformers' tensor parallelism, which leave structured layers to `Colwise` and `Rowwise`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import parallelize_module
from transformers.distributed.tensor_parallel import TensorParallelLayer
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

from einlinear.integrations.tensor_parallel import Colwise, Rowwise, check_layer
from einlinear.nn import Embedding, GatedExperts
from einlinear.nn.layer_descriptions import SelfDescribing

_LINEAR: dict[str, Callable[[], Colwise | Rowwise]] = {
    "colwise": Colwise,
    "colwise_gather_output": partial(Colwise, output_layouts=Replicate()),
    "colwise_rep": partial(Colwise, output_layouts=Replicate()),
    "rowwise": Rowwise,
    "rowwise_split_input": partial(Rowwise, input_layouts=Replicate()),
    "rowwise_rep": partial(Rowwise, input_layouts=Replicate()),
}
_TABLES: dict[str, Callable[[], Colwise | Rowwise]] = {
    "embedding_rowwise": partial(Rowwise, input_layouts=Replicate()),
    "embedding_colwise": partial(Colwise, output_layouts=Replicate()),
}
_EXPERTS: dict[str, Callable[[], Colwise | Rowwise]] = {"moe_tp_experts": Colwise}
# every device keeps the whole layer
_WHOLE = ("replicate", "replicated_with_grad_allreduce", "mla_kv_a_proj")
# of structured layers, for messages: transformers passes names of parameters alone, and a quantised layer may have none
_names = WeakKeyDictionary[nn.Module, str]()


def extend_styles() -> None:
    """Let the styles that a `tp_plan` names shard structured layers by their factors; others stay as they are."""
    for name, style in [*ALL_PARALLEL_STYLES.items()]:
        if not isinstance(style, ExtendedStyle):
            ALL_PARALLEL_STYLES.register(name, ExtendedStyle(name, style))  # type: ignore[arg-type]


def remember_names(model: nn.Module) -> None:
    """Let errors of styles name the structured layers of a model."""
    _names.update({module: name for name, module in model.named_modules() if _is_structured(module)})


def _is_structured(module: nn.Module) -> bool:
    return isinstance(module, SelfDescribing | GatedExperts)


class ExtendedStyle(TensorParallelLayer):
    """A style of transformers for its own layers, and one of ours for structured layers.

    transformers shards the parameters of a module one by one, while they are on the meta device, then replaces its
    forward pass. Structured layers are left alone in the first step, and made parallel as a whole in the second. Their
    parameters are DTensors then, of which every process reads its part from the file.
    """

    def __init__(self, name: str, style: Any) -> None:
        self.name, self.style = name, style

    def validate_param(
        self, module: nn.Module, param: str, mesh: DeviceMesh, parameter_name: str | None = None
    ) -> None:
        if not self._is_ours(module):
            self.style.validate_param(module, param, mesh, parameter_name=parameter_name)
            return
        with _naming((parameter_name or "").removesuffix(f".{param}"), module):
            check_layer(self._structured_style(module), module, mesh)

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        if not self._is_ours(module):
            self.style.shard_param(module, param, mesh)

    def install_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if not self._is_ours(module):
            return self.style.install_forward(module, *args, **kwargs)  # type: ignore[no-any-return]
        with _naming(_names.get(module, ""), module):
            style, (mesh,) = self._structured_style(module), args
            # every process has the parameters, or reads its part of them
            return parallelize_module(module, mesh, style, src_data_rank=None)

    def _is_ours(self, module: nn.Module) -> bool:
        return _is_structured(module) and self.name not in _WHOLE

    def _structured_style(self, module: nn.Module) -> Colwise | Rowwise:
        kinds = {Embedding: _TABLES, GatedExperts: _EXPERTS}
        styles = next((styles for kind, styles in kinds.items() if isinstance(module, kind)), _LINEAR)
        if self.name not in styles:
            allowed = ", ".join([*styles, *_WHOLE])
            raise ValueError(f"the style {self.name!r} is not for a {type(module).__name__}, but {allowed}")
        return styles[self.name]()


@contextmanager
def _naming(name: str, module: nn.Module) -> Iterator[None]:
    """Add the name of a layer to errors, or its class, and what to do."""
    try:
        yield
    except (TypeError, ValueError) as error:
        advice = f"'{_WHOLE[0]}' in tp_plan, for this layer and those that share its features, keeps them whole"
        raise type(error)(f"{name or type(module).__name__}: {error}. The style {advice}") from None
