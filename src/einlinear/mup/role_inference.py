"""Role of a parameter by its name, its shape and, with a base model, by which dimensions grow.

For parameters of modules without a description (`nn/layer_kinds.py`): class tokens, positions, stacked weights of
experts, parameters of a user's own module. Shapes come first: a dimension that does not grow with the width is no
fan-in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from einlinear.nn.layer_kinds import INPUT, VECTOR, Role

# Beginnings of the words of a name ("pos" for position, positional, ...). The first tuple with a match decides; a name
# without any match is that of a matrix.
_VECTOR_WORDS = ("bias", "scale", "scaling", "gamma", "beta", "lambda", "alpha")
# their number of outputs does not depend on the width
_OUTPUT_WORDS = ("router", "gate", "head", "classifier")
_MATRIX_WORDS = ("proj", "weight", "kernel", "matrix", *_OUTPUT_WORDS)
_TABLE_WORDS = (
    *("pos", "emb", "token", "quer", "latent", "prompt", "prefix", "table", "mask", "memory", "probe", "ape", "pad"),
)
# elementwise parameters of state-space models
_ELEMENTWISE = ("A_log", "D")


def infer_role(
    name: str, owner: str, shape: Sequence[int], transposed: bool = False, base: Sequence[int] | None = None
) -> Role | None:
    """Return the role of a parameter by its name and shapes, or None if these contradict each other.

    - A vector has one dimension, not counting those of size 1, or the name of a bias or a scale.
    - A stack of matrices is (experts, out, in), in a module or of a name with "expert", or (n, out, in) where only the
      last two dimensions grow from the base. With `transposed` it is (experts, in, out).
    - A table, role "input", is a batch of one, such as positions (1, n, d), or (n, d) with the name of a table:
      positions, tokens, queries. A parameter that does not grow at all is a table, too.
    - Everything else is a matrix (out, in, ...), as in nn.Linear and convolutions.

    Contradictions are a table of which both dimensions grow, and a matrix whose inputs alone grow and whose name is not
    that of a head or a router, since a table grows like that.

    Args:
        name: the qualified name.
        owner: the class name of the module that has the parameter.
        shape: of the parameter.
        transposed: whether a stack is (experts, in, out), as transformers notes in its modules.
        base: its shape in the base model, of as many dimensions; None without a base model.

    >>> infer_role("embeddings.cls_token", "ViTEmbeddings", (1, 1, 768)).kind
    'vector'
    >>> role = infer_role("mlp.experts.down_proj", "MixtralExperts", (8, 64, 256))
    >>> role.kind, role.in_features, role.out_features, role.stacked
    ('hidden', 256, 64, True)
    """
    words = _words(name, owner)
    if sum(size != 1 for size in shape) <= 1 or name.rpartition(".")[2] in _ELEMENTWISE or _has(words, _VECTOR_WORDS):
        return VECTOR
    grows = None if base is None else [i for i, (now, then) in enumerate(zip(shape, base, strict=True)) if now != then]
    if len(shape) == 3 and ("expert" in f"{name} {owner}".lower() or grows == [1, 2]):
        return matrix_role(shape, stacked=True, transposed=transposed)
    if grows == []:
        return INPUT
    if (len(shape) > 2 and shape[0] == 1) or (_has(words, _TABLE_WORDS) and not _has(words, _MATRIX_WORDS)):
        return INPUT if grows is None or len(grows) == 1 else None
    if grows is not None and 0 not in grows and not _has(words, _OUTPUT_WORDS):
        return None
    return matrix_role(shape)


def matrix_role(shape: Sequence[int], stacked: bool = False, transposed: bool = False) -> Role:
    """Return the role of a matrix (out, in, ...), or of a stack (n, out, in) that may be transposed, (n, in, out)."""
    if stacked and transposed:
        return Role("hidden", shape[1], shape[2], stacked=True)
    out_features, *rest = shape[1:] if stacked else shape
    return Role("hidden", math.prod(rest), out_features, stacked=stacked)


def _has(words: Sequence[str], beginnings: tuple[str, ...]) -> bool:
    return any(word.startswith(beginnings) for word in words)


def _words(name: str, owner: str) -> list[str]:
    """Split a name into words in lower case; "weight" and numbers stand for the names of what they belong to."""
    *parents, last = name.split(".")
    if last.isdigit() and parents:
        *parents, last = parents
    if last == "weight":
        last = f"{parents[-1] if parents else ''} {owner}"
    return re.findall(r"[a-z]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", last).lower())
