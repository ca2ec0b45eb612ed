"""Images for classification, held in memory.

Shapes: N images in a split, B in a batch, C channels, H x W pixels.

load.py           load_images: from a name to standardised Images; scikit-learn's digits
fashion_mnist.py  a source: Fashion-MNIST, read from this machine or downloaded
cifar.py          a source: CIFAR-10 and CIFAR-100, from their binary files
folder.py         a source: a user's folder
dataset.py        Images: what every source returns; a test set for sources without one
batching.py       shuffled, augmented batches, any of them by its number
"""
