"""The role of a parameter by its kind: its name, its shape and, where there is a base model, how the shape grows.

For parameters of modules that `nn/known.py` does not describe: class tokens, positions, the stacked weights of experts,
what a user's own module holds. The shapes come first: a dimension that does not grow with the width is no fan-in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal

from einlinear.nn.foreign import Matrix

# Words that a name has, as far as they are written out here ("pos" stands for position, positional, ...). The first
# line that has one decides; a name without any is that of a matrix.
_BIAS = ("bias", "scale", "scaling", "gamma", "beta", "lambda", "alpha")
_MATRIX = ("proj", "weight", "kernel", "matrix", "router", "gate", "head", "classifier")
_TABLE = ("pos", "emb", "token", "quer", "latent", "prompt", "prefix", "table", "mask", "memory", "probe", "ape", "pad")
_OUTPUTS = ("router", "gate", "head", "classifier")  # their outputs are a fixed number, whatever the width
_ELEMENTWISE = ("A_log", "D")  # of state-space models


def by_kind(
    name: str, owner: str, shape: Sequence[int], transposed: bool = False, base: Sequence[int] | None = None
) -> Matrix | Literal["vector", "table"] | None:
    """Return what a parameter is by its kind: a matrix or a stack of them, a vector, a table of vectors, or None.

    - A vector has one dimension, not counting those of size 1, or the name of a bias or a scale.
    - A stack is (experts, out, in), in a module or of a name with "expert", or (n, out, in) where only the last two
      grow from the base. It may lie transposed, (experts, in, out), which transformers notes in its modules.
    - A table is a batch of one, such as positions (1, n, d), or (n, d) by its name: positions, tokens, queries. What
      does not grow at all is one as well.
    - Anything else is a matrix (out, in, ...), as nn.Linear and convolutions have it.

    None where the name and the shapes contradict: a table of which both dimensions grow, or a matrix whose inputs alone
    grow and whose name is not that of a head or a router, since a table grows like that.

    Args:
        name: the qualified name.
        owner: the name of the class of the module that has the parameter.
        shape: of the parameter.
        transposed: whether a stack is (experts, in, out).
        base: its shape in the base model, of as many dimensions; None if there is none.

    >>> by_kind("embeddings.cls_token", "ViTEmbeddings", (1, 1, 768))
    'vector'
    >>> by_kind("mlp.experts.down_proj", "MixtralExperts", (8, 64, 256))
    Matrix(in_features=256, out_features=64, structure=None, factor=0, beside=None, stacked=True)
    """
    words = _words(name, owner)
    if sum(size != 1 for size in shape) <= 1 or name.rpartition(".")[2] in _ELEMENTWISE or _has(words, _BIAS):
        return "vector"
    grows = None if base is None else [i for i, (now, then) in enumerate(zip(shape, base, strict=True)) if now != then]
    if len(shape) == 3 and ("expert" in f"{name} {owner}".lower() or grows == [1, 2]):
        return as_matrix(shape, stacked=True, transposed=transposed)
    if grows == []:
        return "table"
    if (len(shape) > 2 and shape[0] == 1) or (_has(words, _TABLE) and not _has(words, _MATRIX)):
        return "table" if grows is None or len(grows) == 1 else None
    if grows is not None and 0 not in grows and not _has(words, _OUTPUTS):
        return None
    return as_matrix(shape)


def as_matrix(shape: Sequence[int], stacked: bool = False, transposed: bool = False) -> Matrix:
    """The matrix (out, in, ...) of this shape, or one of a stack (n, out, in), which may lie as (n, in, out)."""
    if stacked and transposed:
        return Matrix(shape[1], shape[2], stacked=True)
    out_features, *rest = shape[1:] if stacked else shape
    return Matrix(math.prod(rest), out_features, stacked=stacked)


def _has(words: Sequence[str], beginnings: tuple[str, ...]) -> bool:
    return any(word.startswith(beginnings) for word in words)


def _words(name: str, owner: str) -> list[str]:
    """The words of a name in lower case; where it says nothing, as "weight" and "0" do, those of what it belongs to."""
    *parents, last = name.split(".")
    if last.isdigit() and parents:
        *parents, last = parents
    if last == "weight":
        last = f"{parents[-1] if parents else ''} {owner}"
    return re.findall(r"[a-z]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", last).lower())
