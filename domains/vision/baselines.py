"""Classifiers of small pictures that need no network: what every model must be better than."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from rich.progress import track

from domains.vision.data import VisionData
from domains.vision.images import Picture
from domains.vision.sources import Images
from zoo.cli.console import console
from zoo.errors import DataError

MOST = 5000
"""Training images that baselines learn from; of more, a draw by `split_seed`."""

SIDE = 16


def baseline_accuracy(data: VisionData) -> dict[str, float]:
    """Top-1 accuracy on the test part of the most frequent class and of classifiers of pixels.

    Pictures are shrunk to 16 x 16, the embedded digits keep their 8 x 8.
    """
    side = 8 if data.name == "digits" else SIDE
    train, note = data.parts["train"], ""
    if len(train) > MOST:
        chosen = np.random.default_rng(data.split_seed).choice(len(train), MOST, replace=False)
        train, note = train.select(sorted(chosen)), f", {MOST} images"
    x, y = pixels(train, side)
    test_x, test_y = pixels(data.parts["test"], side)
    accuracy = {"most frequent class": float(np.mean(test_y == np.bincount(y).argmax()))}
    for name, classifier in _classifiers().items():
        label = f"{name} on {side}x{side} pixels{note}"
        accuracy[label] = float(np.mean(classifier.fit(x, y).predict(test_x) == test_y))
    return accuracy


def _classifiers() -> dict[str, Any]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import SVC

    return {
        "logistic regression": LogisticRegression(max_iter=1000),
        "nearest neighbour": KNeighborsClassifier(1),
        "RBF support vector machine": SVC(C=10),
    }


def pixels(images: Images, side: int) -> tuple[np.ndarray, np.ndarray]:
    """`(n, side * side * C)` float32 pixels in [0, 1] and `(n,)` labels of the pictures that can be read."""
    rows, labels = [], []
    places = range(len(images))
    for i in track(places, "Baselines", console=console, transient=True) if len(images) > 500 else places:
        try:
            rows.append(_small(images.read(i), side).ravel())
        except DataError:
            continue
        labels.append(images.labels[i])
    return np.stack(rows), np.array(labels)


def _small(picture: Picture, side: int) -> np.ndarray:
    """`(side, side, C)`."""
    if isinstance(picture, Image.Image):
        return np.asarray(picture.resize((side, side), Image.Resampling.BOX), np.float32) / 255
    bands = [
        np.asarray(Image.fromarray(band).resize((side, side), Image.Resampling.BOX))
        for band in np.moveaxis(picture, 2, 0)
    ]
    return np.stack(bands, axis=2)
