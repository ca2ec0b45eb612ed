"""Training data: images for classification, sequences of tokens, a synthetic regression.

images/        from the files of many data sets to batches of images, and of their pixels as tokens
text/          from documents to tokens on disk, and to batches of windows of them
sequences.py   Sequences: batches for language models
teacher.py     Teacher: a synthetic regression, the outputs of a random network
sampling.py    the examples of a batch by its number
rng.py         random numbers by seed and step
rows.py        text and rows in files
paths.py       the folder of fetched data
"""

from einlinear_lab.data.images.augment import Augment
from einlinear_lab.data.images.batching import Batches, pixel_permutation
from einlinear_lab.data.images.dataset import Images
from einlinear_lab.data.images.load import load_images
from einlinear_lab.data.images.pixels import PixelSequences
from einlinear_lab.data.sequences import Sequences
from einlinear_lab.data.teacher import Teacher
from einlinear_lab.data.text.prepare import TextConfig, prepare_tokens
from einlinear_lab.data.text.tokens import Tokens, load_tokens
from einlinear_lab.data.text.windows import TextSequences

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
