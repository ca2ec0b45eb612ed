"""Which layers get which structure, by globs on their qualified names."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase

from einlinear.nn.names import as_globs, check_globs, matches_any
from einlinear.structures.spec import check_spec


def match_structures(
    names: Sequence[str],
    structure: str | Mapping[str, str],
    layers: str | Sequence[str],
    exclude: str | Sequence[str],
    named: Collection[str] = (),
) -> dict[str, str]:
    """Return the structures of layers by name: the first one whose glob matches, for those in `layers` or `named`.

    Raises:
        ValueError: an unknown structure, an empty mapping, a glob that matches no layer.
        TypeError: structures or globs that are not text.
    """
    plan = dict(structure) if isinstance(structure, Mapping) else {"*": structure}
    if not plan:
        raise ValueError("the mapping of globs to structures is empty")
    for spec in plan.values():
        check_spec(spec)
    considered, excluded = as_globs(layers, "layers"), as_globs(exclude, "exclude")
    everything, noun = [*names, *named], "layer" if named else "linear layer"
    # a model of convolutions alone has no linear layer that the default could match
    check_globs(considered, names or everything, "layers", "linear layer")
    check_globs(plan, everything, "structure", noun)
    check_globs(excluded, everything, "exclude", noun)
    matched: dict[str, str] = {}
    for name in everything:
        globs = [glob for glob in plan if fnmatchcase(name, glob)]
        is_considered = name in named or matches_any(name, considered)
        if globs and is_considered and not matches_any(name, excluded):
            matched[name] = plan[globs[0]]
    return matched
