"""Language models of transformers with structured feed-forward layers, as in DYAD (Chandy et al., arXiv 2312.06881).

For the transfer of learning rates, OPT's head is untied and attention scores are those of `Attention`. OPT has no
dropout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

from torch import Tensor

from einlinear.conversion import convert
from einlinear.structures import DoesNotFit, structure
from einlinear_lab.models.config import DENSE, ModelConfig, ReferenceModel, Shape

# The data has no special tokens, and the embedding of a padding token would never be trained.
_NO_TOKENS: dict[str, Any] = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


@dataclass(frozen=True, kw_only=True)
class CausalLMConfig(ModelConfig):
    """Config of a language model of transformers; only its feed-forward layers take `structure`.

    Attributes:
        heads: of the attention, of width / heads features each.
    """

    SEQUENCES = True

    heads: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.experts is not None:
            raise ValueError(f"model={self.NAME} has no mixtures of experts: choose model=gpt, or leave out experts")
        if self.base_depth is not None:
            raise ValueError(
                f"model={self.NAME} has no multiplier of its branches, which base_depth needs: leave it out"
            )

    def build(self, shape: Shape) -> ReferenceModel:
        kind = OPT if isinstance(self, OPTConfig) else Pythia
        return kind(vocab=shape.outputs, context=self._context(shape), **vars(self))


@dataclass(frozen=True, kw_only=True)
class OPTConfig(CausalLMConfig):
    """Config of an `OPT`."""

    NAME = "opt"


@dataclass(frozen=True, kw_only=True)
class PythiaConfig(CausalLMConfig):
    """Config of a `Pythia`."""

    NAME = "pythia"


class CausalLM(ReferenceModel, ABC):
    """A language model of transformers that returns logits, like `GPT`.

    Args:
        vocab: the number of different tokens.
        width: of the residual stream.
        context: the most tokens of a sequence.
        config: other attributes of `CausalLMConfig`.

    Attributes:
        FEED_FORWARD: globs of the structured layers; all others stay dense.
        BLOCKS: name of the list of blocks in the model of transformers.
        ATTENTION: name of the attention in a block.

    Shapes:
        integers (n, t) to logits (n, t, vocab), for t up to `context`.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        ValueError: sizes that do not divide, an unknown structure; on call, a sequence that is too long.

    Example:
        >>> import torch, einlinear as el
        >>> from einlinear_lab.models import OPT
        >>> model = OPT(vocab=96, width=64, context=32, structure="dyad")
        >>> model = el.init_(model, zero=model.ZERO)
        >>> model(torch.randint(96, (2, 32))).shape
        torch.Size([2, 32, 96])
        >>> model.macs, OPT(vocab=96, width=64, context=32).macs
        (116736, 165888)
    """

    FEED_FORWARD: ClassVar[tuple[str, str]]
    BLOCKS: ClassVar[str]
    ATTENTION: ClassVar[str]
    CONFIG: ClassVar[type[CausalLMConfig]]

    def __init__(self, vocab: int, width: int, context: int, **config: Any) -> None:
        super().__init__()
        if find_spec("transformers") is None:
            install = "pip install 'einlinear[pretrained]'"
            raise ModuleNotFoundError(
                f"models opt and pythia need a package that is not installed (transformers): {install}"
            )
        c = self.CONFIG(width=width, **config)
        if c.heads < 1 or width % c.heads:
            raise DoesNotFit(f"a width of {width} cannot be divided into {c.heads} heads")
        self.context = context
        sizes = {"vocab_size": vocab, "hidden_size": width, "max_position_embeddings": context}
        sizes |= {"num_hidden_layers": c.depth, "num_attention_heads": c.heads, "tie_word_embeddings": False}
        hidden = c.expansion * width
        self.model = self._dense(sizes | _NO_TOKENS, hidden)
        for block in self.blocks:
            block.get_submodule(self.ATTENTION).scaling = 8 * c.heads / width
        if c.structure != DENSE:
            # Raise if one of the layers does not fit: `convert` would leave it dense.
            structure(c.structure, width, hidden)
            structure(c.structure, hidden, width)
            convert(self.model, c.structure, self.FEED_FORWARD)

    @abstractmethod
    def _dense(self, sizes: dict[str, Any], hidden: int) -> Any:
        """Make the dense model of transformers."""

    def forward(self, tokens: Tensor) -> Tensor:
        self._length(tokens)
        logits: Tensor = self.model(tokens, use_cache=False).logits
        return logits

    @property
    def blocks(self) -> Any:  # type: ignore[override]
        return self.model.get_submodule(self.BLOCKS)


class OPT(CausalLM):
    """Zhang et al., arXiv 2205.01068: learned positions, ReLU."""

    CONFIG = OPTConfig
    ZERO = ("*.out_proj", "*.fc2", "*.lm_head")
    FEED_FORWARD = ("*.fc1", "*.fc2")
    BLOCKS = "model.decoder.layers"
    ATTENTION = "self_attn"

    def _dense(self, sizes: dict[str, Any], hidden: int) -> Any:
        import transformers

        return transformers.OPTForCausalLM(transformers.OPTConfig(**sizes, ffn_dim=hidden, dropout=0.0))


class Pythia(CausalLM):
    """Biderman et al., arXiv 2304.01373, that is GPT-NeoX: rotary positions, attention and feed-forward in parallel."""

    CONFIG = PythiaConfig
    ZERO = ("*.attention.dense", "*.dense_4h_to_h", "*.lm_head")
    FEED_FORWARD = ("*.dense_h_to_4h", "*.dense_4h_to_h")
    BLOCKS = "gpt_neox.layers"
    ATTENTION = "attention"

    def _dense(self, sizes: dict[str, Any], hidden: int) -> Any:
        import transformers

        return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes, intermediate_size=hidden))
