"""The models of experiments: what can be set about each, and how it is built for the data it is trained on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch

from einlinear_lab.data import Images
from einlinear_lab.models import GPT, ReferenceModel, ResidualMLP, ViT
from einlinear_lab.models.blocks import ROLES
from einlinear_lab.runs import causal_lm

DENSE = "dense"


@dataclass(frozen=True)
class Shape:
    """What a model has to know of its data.

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

    @classmethod
    def of_images(cls, images: Images) -> Shape:
        return cls(images.features, len(images.classes), (images.channels, *images.size))


OF_EXPERTS = ("active", "routed")  # options that mean nothing without experts


@dataclass(frozen=True, kw_only=True)
class Model(ABC):
    """What all models have in common.

    Attributes:
        structure: of the linear layers, as for `einlinear.structure`.
        width: of the residual stream.
        depth: residual blocks.
        expansion: how many times wider the blocks' hidden layers are.
        base_width, base_expansion: of the dense model that the learning rate refers to, elsewhere the same.
        experts: makes the blocks mixtures of so many experts; None: none.
        active: how many of them a token goes to.
        routed: what is a mixture: "linear", every linear layer of the blocks; "feed_forward", whole feed-forward
            networks; "both", these and every linear layer of the attention.
        SEQUENCES: whether it takes sequences of tokens, and nothing else.
    """

    NAME: ClassVar[str]
    SEQUENCES: ClassVar[bool] = False

    structure: str = DENSE
    width: int = 64
    depth: int = 3
    expansion: int = 4
    base_width: int = 64
    base_expansion: int = 4
    experts: int | None = None
    active: int = 2
    routed: str = "linear"

    def __post_init__(self) -> None:
        for name in ("width", "depth", "expansion", "base_width", "base_expansion"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @abstractmethod
    def build(self, shape: Shape) -> ReferenceModel:
        """The model, its weights not yet initialised.

        Raises:
            ValueError: data of a kind that it is not made for; sizes or a structure that do not fit.
        """

    def base(self, shape: Shape) -> ReferenceModel:
        """The model that learning rates refer to: dense, of base_width; on the meta device."""
        structures = [own.name for own in fields(self) if own.name.endswith("structure")]
        changes: dict[str, Any] = {name: DENSE for name in structures if getattr(self, name) is not None}
        changes |= {"width": self.base_width, "expansion": self.base_expansion}
        with torch.device("meta"):
            return replace(self, **changes).build(shape)


@dataclass(frozen=True, kw_only=True)
class OfBlocks(Model):
    """A model of feed-forward blocks, whose layers may have structures of their own; None: that of the others.

    Attributes:
        up_structure, down_structure: of the hidden layers and of the outputs of the feed-forward networks.
    """

    up_structure: str | None = None
    down_structure: str | None = None

    @property
    def roles(self) -> dict[str, str]:
        """The structures of the roles that have their own."""
        given = {role: getattr(self, f"{role}_structure", None) for role in ROLES}
        return {role: structure for role, structure in given.items() if structure is not None}


@dataclass(frozen=True, kw_only=True)
class OfAttention(OfBlocks):
    """The same with attention.

    Attributes:
        attention_in_structure: of queries, keys and values.
        attention_out_structure: of the outputs of the attention.
    """

    attention_in_structure: str | None = None
    attention_out_structure: str | None = None


@dataclass(frozen=True, kw_only=True)
class MLP(OfBlocks):
    """A residual MLP, `einlinear.nn.ResidualMLP`; its head is dense.

    Attributes:
        input_structure: of the input layer; None: that of the others.
    """

    NAME = "mlp"

    input_structure: str | None = None

    def build(self, shape: Shape) -> ReferenceModel:
        if shape.context is not None:
            raise ValueError("an mlp takes images or vectors, not sequences of tokens: choose model=gpt")
        return ResidualMLP(
            shape.inputs,
            self.width,
            shape.outputs,
            self.depth,
            self.structure,
            self.expansion,
            input_structure=self.input_structure,
            experts=self.experts,
            active=self.active,
            routed=self.routed,
            roles=self.roles,
        )


@dataclass(frozen=True, kw_only=True)
class Vit(OfAttention):
    """A vision transformer, `einlinear.nn.ViT`; its head is dense.

    Attributes:
        heads: of the attention.
        patch_size: side of a patch in pixels.
        input_structure: of the layer that embeds patches; None: that of the others.
        qk_norm: whether queries and keys are normalised.
        normalize: whether the weights of structured layers are, as by `einlinear.Linear`.
    """

    NAME = "vit"

    heads: int = 4
    patch_size: int = 4
    input_structure: str | None = None
    qk_norm: bool = False
    normalize: bool = False

    def build(self, shape: Shape) -> ReferenceModel:
        if shape.image is None:
            raise ValueError("a vit takes images: choose model=mlp for vectors, model=gpt for sequences of tokens")
        channels, *size = shape.image
        return ViT(
            (size[0], size[1]),
            self.width,
            shape.outputs,
            channels=channels,
            patch_size=self.patch_size,
            depth=self.depth,
            heads=self.heads,
            structure=self.structure,
            expansion=self.expansion,
            qk_norm=self.qk_norm,
            normalize=self.normalize,
            input_structure=self.input_structure,
            experts=self.experts,
            active=self.active,
            routed=self.routed,
            roles=self.roles,
        )


@dataclass(frozen=True, kw_only=True)
class Gpt(OfAttention):
    """A language model, `einlinear.nn.GPT`, without biases.

    Attributes:
        d_head: features of an attention head; None: width / heads.
        heads: of the attention; None: width / d_head.
        head_structure: of the head.
        qk_norm: whether queries and keys are normalised.
        normalize: whether the weights of structured layers are, as by `einlinear.Linear`.
    """

    NAME = "gpt"
    SEQUENCES = True

    d_head: int | None = 64
    heads: int | None = None
    head_structure: str = DENSE
    qk_norm: bool = True
    normalize: bool = True

    def build(self, shape: Shape) -> ReferenceModel:
        if shape.context is None:
            raise ValueError("a gpt takes sequences of tokens: prepare a text, or name pixels:DATA")
        return GPT(
            shape.outputs,
            self.width,
            shape.context,
            depth=self.depth,
            d_head=self.d_head,
            heads=self.heads,
            structure=self.structure,
            head_structure=self.head_structure,
            expansion=self.expansion,
            qk_norm=self.qk_norm,
            normalize=self.normalize,
            experts=self.experts,
            active=self.active,
            routed=self.routed,
            roles=self.roles,
        )


@dataclass(frozen=True, kw_only=True)
class OfTransformers(Model):
    """A language model of transformers, made from a config; only its feed-forward layers take `structure`.

    Attributes:
        heads: of the attention, of width / heads features each.
        KIND: the class of the model.
    """

    SEQUENCES = True
    KIND: ClassVar[type[causal_lm.CausalLM]]

    heads: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.experts is not None:
            raise ValueError(f"model={self.NAME} has no mixtures of experts: choose model=gpt, or leave out experts")

    def build(self, shape: Shape) -> ReferenceModel:
        if shape.context is None:
            raise ValueError(f"model={self.NAME} takes sequences of tokens: prepare a text, or name pixels:DATA")
        return self.KIND(
            shape.outputs,
            self.width,
            shape.context,
            depth=self.depth,
            heads=self.heads,
            structure=self.structure,
            expansion=self.expansion,
        )


@dataclass(frozen=True, kw_only=True)
class Opt(OfTransformers):
    """OPT, `einlinear_lab.runs.causal_lm.OPT`."""

    NAME = "opt"
    KIND = causal_lm.OPT


@dataclass(frozen=True, kw_only=True)
class Pythia(OfTransformers):
    """Pythia, that is GPT-NeoX, `einlinear_lab.runs.causal_lm.Pythia`."""

    NAME = "pythia"
    KIND = causal_lm.Pythia


MODELS: dict[str, type[Model]] = {kind.NAME: kind for kind in (MLP, Vit, Gpt, Opt, Pythia)}
