"""Base classes of the reference models and of their configs; a config builds its model for the shape of the data."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from einlinear.nn.moe.mixture import check_experts
from einlinear.nn.names import name_of
from einlinear_lab.models.macs import macs_per_token

DENSE = "dense"
ROUTED = ("linear", "feed_forward", "both")
# Queries, keys and values; output of the attention; hidden layer and output of a feed-forward network.
ROLES = ("attention_in", "attention_out", "up", "down")
# The papers whose models have a variant, by arXiv number.
PAPER_1, PAPER_2 = "2406.06248", "2410.02117"
# Options that have no effect without experts.
OF_EXPERTS = ("active", "routed")


@dataclass(frozen=True)
class Shape:
    """Shape of the data that a model is built for.

    Attributes:
        inputs: features of an input vector; of images, all their values.
        outputs: classes, tokens of the vocabulary, or numbers to predict.
        image: (channels, height, width), of images only.
        context: tokens of a sequence, of sequences only.
    """

    inputs: int
    outputs: int
    image: tuple[int, int, int] | None = None
    context: int | None = None


class ReferenceModel(nn.Module):
    """A model of residual blocks.

    Attributes:
        ZERO: globs of the zero-initialised layers: ``el.init_(model, zero=model.ZERO)``.
        LR_SCALE: glob -> learning-rate scale: ``el.param_groups(model, ..., lr_scale=model.LR_SCALE)``.
        blocks: the residual blocks, in order.
        context: the most tokens of a sequence; None for models that take none.
    """

    ZERO: ClassVar[tuple[str, ...]]
    LR_SCALE: ClassVar[Mapping[str, float]] = {}
    blocks: nn.Sequential
    context: int | None = None

    @property
    def last_block(self) -> str:
        """Qualified name of the last block, whose output a coordinate check measures."""
        return name_of(self, self.blocks[-1])

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one input, or one token of a sequence that fills the context: `macs_per_token`."""
        return macs_per_token(self, self.context)

    def _length(self, tokens: Tensor) -> int:
        """Return the length of sequences (n, t). Raise ValueError if it is more than the context."""
        length = tokens.shape[1]
        if self.context is not None and length > self.context:
            raise ValueError(f"a sequence of {length} tokens is longer than the context of {self.context}")
        return length


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ABC):
    """Config that all models share.

    Attributes:
        structure: of the linear layers, as for `einlinear.structure`.
        width: of the residual stream.
        depth: number of residual blocks.
        expansion: width of the blocks' hidden layers over `width`.
        base_width, base_expansion: of the dense model that the learning rate refers to, elsewhere the same.
        base_depth: of that model, if it has another; branches are then multiplied by those of the base times
            (base_depth / depth)^alpha. None: `depth`.
        alpha: 1 (CompleteP, arXiv 2505.01618) to 0.5, see `einlinear.param_groups`.
        experts: number of experts of the mixtures in the blocks; None: no mixtures.
        active: experts that each token is routed to.
        routed: layers that are mixtures: "linear", every linear layer of the blocks; "feed_forward", whole feed-forward
            networks; "both", these and every linear layer of the attention.
        NAME: of the model.
        SEQUENCES: whether the model takes sequences of tokens, and nothing else.

    Raises:
        ValueError: sizes or experts out of range, another `routed`, or whole networks as experts with structures for
            `up` and `down`.
    """

    NAME: ClassVar[str]
    SEQUENCES: ClassVar[bool] = False

    structure: str = DENSE
    width: int = 64
    depth: int = 3
    expansion: int = 4
    base_width: int = 64
    base_expansion: int = 4
    base_depth: int | None = None
    alpha: float = 1.0
    experts: int | None = None
    active: int = 2
    routed: str = "linear"

    def __post_init__(self) -> None:
        for name in ("width", "depth", "expansion", "base_width", "base_expansion", "base_depth"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.routed not in ROUTED:
            raise ValueError(f"routed must be {' or '.join(ROUTED)}, not {self.routed!r}")
        if self.experts is not None:
            check_experts(self.experts, self.active)
            if self.routed != "linear" and self.roles.keys() & {"up", "down"}:
                raise ValueError(
                    "experts that are whole networks have one structure: leave out up_structure and down_structure"
                )

    @abstractmethod
    def build(self, shape: Shape) -> ReferenceModel:
        """Build the model, not yet initialised. Raises ValueError for data or sizes that do not fit."""

    def _context(self, shape: Shape) -> int:
        if shape.context is None:
            raise ValueError(f"model={self.NAME} takes sequences of tokens: prepare a text, or name pixels:DATA")
        return shape.context

    def base(self, shape: Shape) -> ReferenceModel:
        """Build the model that learning rates refer to: dense, of base_width and base_depth; on the meta device."""
        structures = [field.name for field in fields(self) if field.name.endswith("structure")]
        changes: dict[str, Any] = {name: DENSE for name in structures if getattr(self, name) is not None}
        changes |= {"width": self.base_width, "expansion": self.base_expansion, "depth": self.base_depth or self.depth}
        with torch.device("meta"):
            return replace(self, **changes).build(shape)

    @property
    def branch_multiplier(self) -> float:
        """What the branches of all blocks are multiplied by."""
        base_depth = self.base_depth or self.depth
        return self._branch_multiplier(base_depth) * math.pow(base_depth / self.depth, self.alpha)

    def _branch_multiplier(self, depth: int) -> float:
        """Return the multiplier of a model of that depth, by itself."""
        return 1.0

    @property
    def roles(self) -> dict[str, str]:
        """Structures of the roles that have their own."""
        structures = {role: getattr(self, f"{role}_structure", None) for role in ROLES}
        return {role: structure for role, structure in structures.items() if structure is not None}


@dataclass(frozen=True, kw_only=True)
class FeedForwardConfig(ModelConfig):
    """Config of a model of feed-forward blocks; a structure of None is that of the other layers.

    Attributes:
        up_structure, down_structure: of the hidden layers and of the outputs of the feed-forward networks.
        paper: arXiv number of the paper whose published model is built, see there; None: the default model. With a
            paper the families btt, tt and kronecker have split="published", unless a split is named.
        PAPERS: papers with a variant of this model.

    Raises:
        ValueError: also a paper without a variant of this model, or experts in a variant of arXiv 2406.06248.
    """

    PAPERS: ClassVar[tuple[str, ...]] = (PAPER_1,)

    up_structure: str | None = None
    down_structure: str | None = None
    paper: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.paper not in (None, *self.PAPERS):
            papers = " or ".join(self.PAPERS)
            raise ValueError(f"model={self.NAME} has variants of paper={papers}, not of {self.paper!r}")
        if self.paper == PAPER_1 and self.experts is not None:
            raise ValueError(f"paper={PAPER_1} has no mixtures of experts: choose model=gpt paper={PAPER_2}")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(FeedForwardConfig):
    """Config of a model of transformer blocks.

    Attributes:
        attention_in_structure: of queries, keys and values.
        attention_out_structure: of the outputs of the attention.
    """

    attention_in_structure: str | None = None
    attention_out_structure: str | None = None
