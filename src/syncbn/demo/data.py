"""scikit-learn's handwritten digits: 1,797 images of 8×8 pixels, cut into training and test images."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

CLASSES = 10
# The split is the same whatever the seed of the training, so that accuracies can be compared.
TEST_IMAGES = 360


class Digits(NamedTuple):
    """Images float32 [N, 8, 8, 1] in [0, 1], labels int32 [N]."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def digits() -> Digits:
    """The images, split with equal shares of each digit."""
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 16).astype("float32")
    train, test, train_labels, test_labels = train_test_split(
        images, labels.astype("int32"), test_size=TEST_IMAGES, stratify=labels, random_state=0
    )
    return Digits(train, train_labels, test, test_labels)
