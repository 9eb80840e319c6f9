"""scikit-learn's handwritten digits: 1,797 images of 8×8 pixels, cut into training and test images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from syncbn.demo import TRAIN_IMAGES

CLASSES = 10


class Digits(NamedTuple):
    """Images float32 [N, 8, 8, 1] in [0, 1], labels int32 [N]."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def digits() -> Digits:
    """The images, split with equal shares of each digit. The split does not depend on the seed of the training."""
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 16).astype("float32")
    train, test, train_labels, test_labels = train_test_split(
        images, labels.astype("int32"), train_size=TRAIN_IMAGES, stratify=labels, random_state=0
    )
    return Digits(train, train_labels, test, test_labels)


def batches(size: int, seed: int) -> Iterator[np.ndarray]:
    """Row numbers [size] of the training images, without end, in a new order for each pass.

    The last, incomplete batch of a pass is dropped: a local batch norm may turn to NaN where a replica is empty.
    """
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(TRAIN_IMAGES)
        yield from order[: TRAIN_IMAGES // size * size].reshape(-1, size)
