"""Images for classification, held in memory, and batches of them.

Shapes: N images in a split, B in a batch, C channels, H x W pixels.

images.py         Images: what every source gives
fashion_mnist.py  a source: Fashion-MNIST, read from this machine or downloaded
digits.py         a source: scikit-learn's digits
folder.py         a source: a user's folder
split.py          a test set for sources without one
load.py           load_images: from a name to standardised Images
augment.py        shifts, flips and mixup
batching.py       shuffled batches
"""

from einlinear.data.augment import Augment
from einlinear.data.batching import Batches, pixel_permutation, seeded
from einlinear.data.images import Images
from einlinear.data.load import load_images

__all__ = ["Augment", "Batches", "Images", "load_images", "pixel_permutation", "seeded"]
