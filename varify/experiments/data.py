"""Data sets of the command line, as tensors of images `(n, 1, 32, 32)`, and letters that are none of their classes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 32


class DataError(Exception):
    """A data set can't be had; the message says what to do."""


@dataclass(frozen=True)
class Images:
    """A split data set: images `(n, 1, 32, 32)`, labels `(n,)`, and letters A to J drawn like the images."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    letters: Tensor


def standardize(images: Tensor, like: Tensor) -> Tensor:
    """Bring `images` to the size of the network's input and to mean 0, std 1 of the training images `like`."""
    images, like = (
        F.interpolate(x.unsqueeze(1).float(), (SIZE, SIZE), mode="bilinear", align_corners=False)
        for x in (images, like)
    )
    return (images - like.mean()) / like.std()


def digits(root: Path) -> Images:
    """The 1,797 digits of 8×8 that come with scikit-learn; every fourth is held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = torch.as_tensor(data.images / 16.0), torch.as_tensor(data.target)
    held_out = torch.arange(len(labels)) % 4 == 3
    train = images[~held_out]
    return Images(
        standardize(train, train),
        labels[~held_out],
        standardize(images[held_out], train),
        labels[held_out],
        standardize(letters(8), train),
    )


def _torchvision(name: str) -> Callable[[Path], Images]:
    def load(root: Path) -> Images:
        try:
            from torchvision import datasets
        except (ImportError, RuntimeError) as error:
            raise DataError(f"{name} needs torchvision (pip install varify[vision]): {error}") from error
        try:
            train, test = (getattr(datasets, name)(root, train=part, download=True) for part in (True, False))
        except (OSError, RuntimeError) as error:
            raise DataError(f"{name} is not in {root} and can't be downloaded there: {error}") from error
        pixels = train.data / 255.0
        return Images(
            standardize(pixels, pixels),
            train.targets,
            standardize(test.data / 255.0, pixels),
            test.targets,
            standardize(letters(28), pixels),
        )

    return load


DATA: dict[str, Callable[[Path], Images]] = {
    "digits": digits,
    "mnist": _torchvision("MNIST"),
    "fashion-mnist": _torchvision("FashionMNIST"),
}


def letters(size: int) -> Tensor:
    """A to J in the fonts that matplotlib ships, white on black, `(n, size, size)` within [0, 1]."""
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    glyphs = []
    for path in sorted(Path(get_data_path(), "fonts", "ttf").glob("DejaVuS*.ttf")):
        if "Display" in path.name:  # has mathematical signs only
            continue
        font = ImageFont.truetype(str(path), 96)
        for letter in "ABCDEFGHIJ":
            left, top, right, bottom = font.getbbox(letter)
            side = int(max(right - left, bottom - top) * 1.1)
            canvas = Image.new("L", (side, side))
            centered = ((side - right - left) / 2, (side - bottom - top) / 2)
            ImageDraw.Draw(canvas).text(centered, letter, fill=255, font=font)
            glyphs.append(np.asarray(canvas.resize((size, size), Image.Resampling.BOX)) / 255.0)
    return torch.as_tensor(np.stack(glyphs))
