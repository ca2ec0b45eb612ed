"""Whether an optimizer has the settings that were asked for: its own checkpoint overrides those of its groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, optim

# of groups; "params" and "param_names" are compared one by one
_IGNORED = ("params", "param_names", "inferred")


def check_groups(
    optimizer: optim.Optimizer | Iterable[optim.Optimizer],
    groups: Sequence[Mapping[str, Any]],
    *,
    ignore: Sequence[str] = (),
) -> None:
    """Raise ValueError unless an optimizer has these parameter groups, and its state belongs to their parameters.

    `Optimizer.load_state_dict` replaces the settings of all groups by those of the checkpoint, and takes parameters for
    the same by their position alone. After another model, order of layers, width or learning rate, this tells.

    Args:
        optimizer: one that may have loaded a checkpoint, or several that share the groups.
        groups: made anew by `param_groups`, with the arguments that training is meant to have.
        ignore: settings that may differ, such as "lr" where a schedule has changed it. Of groups that a scheduler of
            torch changes, "initial_lr" is compared.

    Raises:
        ValueError: with all settings that differ, by parameter.

    Example:
        >>> import torch, einlinear as el
        >>> layer = el.Linear(64, 64, "btt")
        >>> saved = torch.optim.AdamW(el.param_groups(layer, lr=1e-2, base=None)).state_dict()
        >>> groups = el.param_groups(layer, lr=1e-3, base=None)
        >>> optimizer = torch.optim.AdamW(groups)
        >>> optimizer.load_state_dict(saved)
        >>> el.check_groups(optimizer, groups)
        Traceback (most recent call last):
            ...
        ValueError: the optimizer has other settings than the groups: A, B: lr is 0.04, not 0.004; bias: lr is 0.01, ...
    """
    optimizers = [optimizer] if isinstance(optimizer, optim.Optimizer) else list(optimizer)
    present = {id(p): (one, group, i) for one in optimizers for group in one.param_groups for i, p in _numbered(group)}
    problems: dict[str, list[str]] = {}
    for group in groups:
        for p, name in zip(group["params"], group["param_names"], strict=True):
            one, own, i = present.pop(id(p), (None, {}, 0))
            if one is None:
                problems.setdefault("the optimizer does not have it", []).append(name)
                continue
            for problem in (*_settings(own, group, ignore), *_identity(one.state.get(p, {}), own, i, p, name)):
                problems.setdefault(problem, []).append(name)
    if present:
        names = [_name(group, i) for _, group, i in present.values()]
        problems["the groups do not have it"] = names
    if problems:
        listed = "; ".join(f"{_listed(names)}: {problem}" for problem, names in problems.items())
        raise ValueError(f"the optimizer has other settings than the groups: {listed}")


def _settings(own: Mapping[str, Any], asked: Mapping[str, Any], ignore: Sequence[str]) -> Iterable[str]:
    for key, value in asked.items():
        if key in (*_IGNORED, *ignore):
            continue
        has = own.get("initial_lr", own.get(key)) if key == "lr" else own.get(key)
        # JSON and safetensors turn tuples into lists
        if has != value and not (isinstance(value, tuple) and repr(has) == repr(_as_list(value))):
            yield f"{key} is {has}, not {value}"


def _identity(state: Mapping[str, Any], group: Mapping[str, Any], i: int, p: Tensor, name: str) -> Iterable[str]:
    if (loaded := _name(group, i)) not in ("", name):
        yield f"its state is that of {loaded}"
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim() and value.shape != p.shape:
            yield f"{key} has shape {tuple(value.shape)}, not {tuple(p.shape)}"


def _numbered(group: Mapping[str, Any]) -> Iterable[tuple[int, Tensor]]:
    return enumerate(group["params"])


def _name(group: Mapping[str, Any], i: int) -> str:
    names = group.get("param_names", ())
    return str(names[i]) if i < len(names) else ""


def _as_list(value: Any) -> Any:
    return [_as_list(item) for item in value] if isinstance(value, tuple) else value


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
