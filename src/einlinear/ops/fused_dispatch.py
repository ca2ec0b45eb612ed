"""Dispatch of several layers: whether a block runs fused, and whether layers of one input run as one product.

The rules count tokens and entries of factors; their constants come from measurements.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from einlinear import structures
from einlinear.ops.backends import REGISTRY, check_name, reason_unsupported
from einlinear.ops.context import forced
from einlinear.ops.dispatch import assume_constant_result, cached, choose
from einlinear.structures import Structure

# a feed-forward block runs fused with no fewer tokens, and no more entries of all its factors
FUSED_TOKENS, FUSED_ENTRIES = 16, 2**23
# Backward, every thread has gradients of its own of all factors, to which it adds for every tile, so a block of more
# entries than FUSED_ENTRIES_TRAINING needs many tokens. Every hidden feature costs the products that compute it again,
# in place of writing and reading it.
FUSED_ENTRIES_TRAINING, FUSED_TOKENS_TRAINING, FUSED_MACS_PER_FEATURE = 2**20, 1024, 384
# Layers of one input are stacked up to so many entries together: more leave the cache between two tiles of tokens, in
# training beside their gradients.
STACKED_ENTRIES, STACKED_ENTRIES_TRAINING = 2**19, 2**18


def reason_not_to_fuse(
    structures: Sequence[Structure],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    training: bool = False,
    backend: str | None = None,
) -> str | None:
    """Return why a feed-forward block runs one layer after the other, or None if it runs fused.

    Args:
        structures: of its layers.
        tokens, dtype, device, training: as for `choose`.
        backend: of the call; "cpu" fuses all that can be fused, as `einlinear.backend("cpu")` does. "triton", which is
            experimental and not measured on a GPU yet, fuses where it is forced.
    """
    name = backend_of_fused_blocks(backend)
    backend = backend or forced().backend
    if REGISTRY[check_name(name)].fused_blocks is None:
        return f"the backend {backend!r} is forced, which has no fused blocks"
    if backend is None:
        if tokens < FUSED_TOKENS:
            return f"fewer than {FUSED_TOKENS} tokens are faster layer by layer"
        entries = sum([structure.params for structure in structures])
        if entries > FUSED_ENTRIES:
            return f"its factors have {entries:,} entries, but no more than {FUSED_ENTRIES:,} stay in cache together"
        if training and entries > FUSED_ENTRIES_TRAINING:
            if tokens < FUSED_TOKENS_TRAINING:
                return f"training with {entries:,} entries of factors needs {FUSED_TOKENS_TRAINING:,} tokens to pay"
            macs = sum([structure.macs for structure in structures[:-1]]) // structures[-1].in_features
            if macs > FUSED_MACS_PER_FEATURE:
                return (
                    f"a hidden feature costs {macs:,} multiply-accumulates, and its backward pass would compute it "
                    f"again, which pays up to {FUSED_MACS_PER_FEATURE}"
                )
    if training and forced().recompute is False:
        return "its backward pass computes hidden features again, but einlinear.backend(recompute=False) saves them"
    why = reason_unsupported(name, structures[0], dtype, device)
    return None if why is None else f"the backend {name!r}, which fuses blocks, cannot run: {why}"


def backend_of_fused_blocks(backend: str | None = None) -> str:
    """Return the backend that runs feed-forward blocks if they are fused: that of a call, the forced one, or "cpu"."""
    return backend or forced().backend or "cpu"


def reason_not_to_stack(
    structure: Structure,
    layers: int,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    training: bool = False,
) -> str | None:
    """Return why layers of one structure and one input run one after the other, or None if they run as one product.

    One product of stacked factors saves calls and reads of the input, but the factors are copied for every call.

    Args:
        structure: of each of the layers.
        layers: their number.
        tokens, dtype, device, training: as for `choose`.
    """
    if forced().backend not in (None, "cpu"):
        return f"the backend {forced().backend!r} is forced, for which stacked layers were not measured"
    return _reason_not_to_stack(structure, layers, tokens, dtype, device, training)


@cached
def _reason_not_to_stack(
    structure: Structure, layers: int, tokens: int, dtype: torch.dtype, device: torch.device, training: bool
) -> str | None:
    # measured for 3 layers of 256 to 1024 features (benchmarks/call_overhead.py): from here on up to 1.2
    # times as fast, with fewer tokens about even or slower
    entries, saved = layers * structure.params, (layers - 1) * tokens * structure.in_features
    limit = STACKED_ENTRIES_TRAINING if training else STACKED_ENTRIES
    if entries > limit:
        return f"together their factors have {entries:,} entries, but no more than {limit:,} stay in cache"
    if 2 * entries > saved:
        return f"to copy {entries:,} entries takes longer than to read {saved:,} features of the input again"
    try:
        stacked = structures.stack(structure, layers)
    except ValueError as error:
        return str(error)
    backend = choose(stacked, tokens, dtype, device, training).backend
    return None if backend == "cpu" else f"the backend {backend!r} runs them, for which stacks were not measured"


@assume_constant_result
def choose_fused_for_compiler(
    specs: Sequence[str],
    features: Sequence[int],
    dtype: torch.dtype,
    device: str,
    backend: str | None,
) -> str | None:
    """Return the backend with which torch.compile traces a block as a single operator, or None if it traces layers.

    The layers are up, down and gate. The features are those of the input, the hidden layer and the output.
    """
    in_features, hidden_features, out_features = features
    sizes = ((in_features, hidden_features), (hidden_features, out_features), (in_features, hidden_features))
    layers = [structures.structure(spec, *size) for spec, size in zip(specs, sizes)]
    # for many tokens, as in `choose_for_compiler`
    reason = reason_not_to_fuse(layers, 2048, dtype, torch.device(device), True, backend)
    return backend_of_fused_blocks(backend) if reason is None else None
