"""Training data: images for classification, sequences of tokens, a synthetic regression.

images/       from the files of many data sets to batches of images
text/         from documents to tokens on disk
sequences.py  batches for language models: windows of a text, pixels of images
teacher.py    a synthetic regression: the outputs of a random network
sampling.py   random numbers and the examples of a batch, by its number
rows.py       text and rows in files
paths.py      the folder of fetched data
"""

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
