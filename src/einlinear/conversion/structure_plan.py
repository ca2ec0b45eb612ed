"""Which layers get which structure, by globs on their qualified names."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase

from einlinear.nn.names import check_globs, matching
from einlinear.structures.spec import check_spec


def match_structures(
    names: Sequence[str],
    structure: str | Mapping[str, str],
    layers: str | Sequence[str] | None,
    exclude: str | Sequence[str],
    named: Collection[str] = (),
) -> dict[str, str]:
    """Return the structures of layers by name: the first one whose glob matches, for those in `layers` or `named`.

    `layers` None stands for all names.

    Raises:
        ValueError: an unknown structure, an empty mapping, no names, a glob that matches none.
        TypeError: structures or globs that are not text.
    """
    plan = dict(structure) if isinstance(structure, Mapping) else {"*": structure}
    if not plan:
        raise ValueError("the mapping of globs to structures is empty")
    for spec in plan.values():
        check_spec(spec)
    everything, noun = dict.fromkeys([*names, *named]), "layer" if named else "linear layer"
    if not everything:
        raise ValueError("the model has no linear layer")
    # "*" is no mistake in a model of convolutions alone
    considered = {*matching(dict.fromkeys(names), None if layers == "*" else layers, "layers", "linear layer"), *named}
    excluded = matching(everything, exclude, "exclude", noun)
    check_globs(plan, [*everything], "structure", noun)
    matched: dict[str, str] = {}
    for name in everything:
        globs = [glob for glob in plan if fnmatchcase(name, glob)]
        if globs and name in considered and name not in excluded:
            matched[name] = plan[globs[0]]
    return matched
