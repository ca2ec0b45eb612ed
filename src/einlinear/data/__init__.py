"""What models are trained on: images for classification, sequences of tokens, a synthetic regression.

Shapes: N images in a split, B in a batch, C channels, H x W pixels, T tokens of a sequence.

images.py         Images: what every source of images gives
fashion_mnist.py  a source: Fashion-MNIST, read from this machine or downloaded
digits.py         a source: scikit-learn's digits
cifar.py          a source: CIFAR-10 and CIFAR-100, from their binary files
folder.py         a source: a user's folder
split.py          a test set for sources without one
load.py           load_images: from a name to standardised Images
augment.py        shifts, flips and mixup
batching.py       shuffled batches of them, any by its number

part.py           Part: what every source of text gives
text.py           read_text: from a name to documents, in parts
english.py        a source: English from Debian packages
streamed.py       a source: rows of the Hugging Face hub, or of local files like these
encode.py         characters and byte pairs: from text to tokens and back
prepare.py        prepare_tokens: from documents to tokens on disk, a share of them held out
writer.py         writes these files so that none is ever half there
tokens.py         Tokens: opens and checks them

draws.py          random numbers by seed and step
rows.py           which rows a batch has
sequences.py      batches of windows of a text, any of them by its number
pixels.py         the same of the pixels of images
teacher.py        what a random network computes, by seed and step
"""

from einlinear.data.augment import Augment
from einlinear.data.batching import Batches, pixel_permutation
from einlinear.data.images import Images
from einlinear.data.load import load_images
from einlinear.data.pixels import PixelSequences
from einlinear.data.prepare import Recipe, prepare_tokens
from einlinear.data.sequences import Sequences, TextSequences
from einlinear.data.teacher import Teacher
from einlinear.data.tokens import Tokens, load_tokens

__all__ = [
    "Augment",
    "Batches",
    "Images",
    "PixelSequences",
    "Recipe",
    "Sequences",
    "Teacher",
    "TextSequences",
    "Tokens",
    "load_images",
    "load_tokens",
    "pixel_permutation",
    "prepare_tokens",
]
