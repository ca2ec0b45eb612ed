"""Language models of transformers, made from a config, whose feed-forward layers are structured.

These are the models of DYAD (Chandy et al., arXiv 2312.06881). What differs from the published architectures is what
learning rates that carry over from width to width need (Yang et al., arXiv 2203.03466): OPT's head has a weight of its
own, and scores are multiplied by 8 / d_head, which for heads of 64 features, as the published ones are, is the same as
1 / sqrt(d_head). OPT has no dropout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib.util import find_spec
from typing import Any, ClassVar

from torch import Tensor

from einlinear.conversion import convert
from einlinear.structures import DoesNotFit, structure
from einlinear_lab.models import ReferenceModel
from einlinear_lab.models.macs import macs_per_token

# Special tokens are none of the data's; the row of a padding token would never be trained.
_NO_TOKENS: dict[str, Any] = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


class CausalLM(ReferenceModel, ABC):
    """A model of transformers that gives logits, as `einlinear.nn.GPT` does.

    Args:
        vocab: the number of different tokens.
        width: of the residual stream.
        context: the most tokens of a sequence.
        depth: the number of blocks.
        heads: of the attention, of width / heads features each.
        structure: of the two feed-forward layers of every block, as for `einlinear.convert`; all others stay dense.
        expansion: of the blocks' hidden layer.

    Attributes:
        FEED_FORWARD: globs on the layers that are structured.
        BLOCKS: the name of the list of blocks in the model of transformers.
        ATTENTION: the name of the attention in a block.

    Shapes:
        integers (n, t) to logits (n, t, vocab), for t up to `context`.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        ValueError: sizes that do not divide as they must, an unknown structure; on call, a sequence that is too long.

    Example:
        >>> import torch, einlinear as el
        >>> model = OPT(vocab=96, width=64, context=32, structure="dyad")
        >>> model = el.init_(model, zero=model.ZERO)
        >>> model(torch.randint(96, (2, 32))).shape
        torch.Size([2, 32, 96])
        >>> isinstance(model.blocks[0].fc1, el.Linear), isinstance(model.blocks[0].self_attn.q_proj, el.Linear)
        (True, False)
        >>> model.macs, OPT(vocab=96, width=64, context=32).macs
        (116736, 165888)
    """

    FEED_FORWARD: ClassVar[tuple[str, str]]
    BLOCKS: ClassVar[str]
    ATTENTION: ClassVar[str]

    def __init__(
        self,
        vocab: int,
        width: int,
        context: int,
        *,
        depth: int = 3,
        heads: int = 4,
        structure: str = "dense",
        expansion: int = 4,
    ) -> None:
        super().__init__()
        _check_installed()
        if heads < 1 or width % heads:
            raise DoesNotFit(f"a width of {width} cannot be divided into {heads} heads")
        self.context = context
        sizes = {"vocab_size": vocab, "hidden_size": width, "max_position_embeddings": context}
        sizes |= {"num_hidden_layers": depth, "num_attention_heads": heads}
        self.model = self._made({**sizes, **_NO_TOKENS, "tie_word_embeddings": False}, expansion * width)
        for block in self.blocks:
            block.get_submodule(self.ATTENTION).scaling = 8 * heads / width
        if structure != "dense":
            _check_fits(structure, width, expansion * width)
            convert(self.model, structure, self.FEED_FORWARD)

    @abstractmethod
    def _made(self, config: dict[str, Any], hidden: int) -> Any:
        """The dense model of a config, with so many features in the hidden layers."""

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] > self.context:
            raise ValueError(f"a sequence of {tokens.shape[1]} tokens is longer than the context of {self.context}")
        logits: Tensor = self.model(tokens, use_cache=False).logits
        return logits

    @property
    def blocks(self) -> Any:  # type: ignore[override]  # they are where transformers has them
        return self.model.get_submodule(self.BLOCKS)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one token of a sequence that fills the context."""
        return macs_per_token(self, self.context)


class OPT(CausalLM):
    """Zhang et al., arXiv 2205.01068: learned positions, ReLU."""

    ZERO = ("*.out_proj", "*.fc2", "*.lm_head")
    FEED_FORWARD = ("*.fc1", "*.fc2")
    BLOCKS = "model.decoder.layers"
    ATTENTION = "self_attn"

    def _made(self, config: dict[str, Any], hidden: int) -> Any:
        from transformers import OPTConfig, OPTForCausalLM

        return OPTForCausalLM(OPTConfig(**config, ffn_dim=hidden, dropout=0.0))


class Pythia(CausalLM):
    """Biderman et al., arXiv 2304.01373, that is GPT-NeoX: rotary positions, attention and feed-forward in parallel."""

    ZERO = ("*.attention.dense", "*.dense_4h_to_h", "*.lm_head")
    FEED_FORWARD = ("*.dense_h_to_4h", "*.dense_4h_to_h")
    BLOCKS = "gpt_neox.layers"
    ATTENTION = "attention"

    def _made(self, config: dict[str, Any], hidden: int) -> Any:
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

        return GPTNeoXForCausalLM(GPTNeoXConfig(**config, intermediate_size=hidden))


def _check_installed() -> None:
    if find_spec("transformers") is None:
        raise ModuleNotFoundError(
            "models opt and pythia need a package that is not installed (transformers). Install it with:  "
            "pip install 'einlinear[pretrained]'"
        )


def _check_fits(spec: str, width: int, hidden: int) -> None:
    """Raise DoesNotFit where one of the two layers would stay dense."""
    structure(spec, width, hidden)
    structure(spec, hidden, width)
