"""Training data: images for classification, text and pixels as sequences of tokens, a synthetic regression."""

from einlinear_lab.data.images.batching import Augment, Batches, pixel_permutation
from einlinear_lab.data.images.dataset import Images
from einlinear_lab.data.images.load import load_images
from einlinear_lab.data.sequences import PixelSequences, Sequences, TextSequences
from einlinear_lab.data.teacher import Teacher
from einlinear_lab.data.text.prepare import TextConfig, prepare_tokens
from einlinear_lab.data.text.tokens import Tokens, load_tokens

__all__ = [
    "Augment",
    "Batches",
    "Images",
    "PixelSequences",
    "Sequences",
    "Teacher",
    "TextConfig",
    "TextSequences",
    "Tokens",
    "load_images",
    "load_tokens",
    "pixel_permutation",
    "prepare_tokens",
]
