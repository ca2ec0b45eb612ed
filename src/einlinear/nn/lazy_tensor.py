"""`LazyTensor`: a tensor whose values are computed when a function needs them, and what it answers without them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_METADATA = (
    "dtype device shape layout ndim requires_grad is_leaf itemsize nbytes size dim ndimension numel nelement "
    "element_size get_device __len__ is_floating_point is_complex is_signed is_inference is_meta is_cpu is_cuda is_xpu "
    "is_mps is_xla is_mtia is_ipu is_maia is_vulkan is_mkldnn is_quantized is_nested is_sparse is_sparse_csr"
)
METADATA_NAMES = frozenset(_METADATA.split())
_ATTRIBUTES = [getattr(owner, name) for owner in (Tensor, torch) for name in METADATA_NAMES if hasattr(owner, name)]
# torch calls a property by its getter
METADATA = frozenset([*_ATTRIBUTES, *(getattr(attribute, "__get__", attribute) for attribute in _ATTRIBUTES)])


class LazyTensor(Tensor):
    """Base class of tensors without values of their own: `placeholder` stands for these."""

    def value(self, function: Any = None) -> Tensor:
        """Return the values as an ordinary tensor, for a function or, if None, for anything."""
        raise NotImplementedError


@lru_cache(maxsize=4096)
def placeholder(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a read-only NaN of this shape: what code without Python, such as `other.data = layer.weight`, sees."""
    with torch.inference_mode(False), torch._C._DisableTorchDispatch():
        nan = torch.full((), torch.nan, dtype=dtype, device=device)
        torch._C._set_throw_on_mutable_data_ptr(nan)
        return nan.expand(shape)
