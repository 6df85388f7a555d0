"""A data set as tensors of one size, standardized by its training images."""

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 32


@dataclass(frozen=True)
class Images:
    """A split data set.

    Attributes:
        train: `(n, channels, size, size)`, of mean 0 and std 1 in each channel.
        train_labels: `(n,)`, from 0.
        test: as `train`, standardized by the training images.
        test_labels: `(n,)`.
        mean: of the training images within [0, 1], `(channels, 1, 1)`; `std` likewise.
        classes: their names.
        native: pixels of a side before the images were brought to `size`.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    mean: Tensor
    std: Tensor
    classes: tuple[str, ...]
    native: int

    @classmethod
    def of(
        cls, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: tuple[str, ...], size: int = SIZE
    ) -> "Images":
        """From pixels within [0, 1], `(n, channels, height, width)`, and labels."""
        x = resized(train[0], size)
        mean = x.mean((0, 2, 3), keepdim=True)[0]
        std = x.std((0, 2, 3), keepdim=True)[0].clamp_min(1e-6)
        held_out = (resized(test[0], size) - mean) / std
        return cls((x - mean) / std, train[1], held_out, test[1], mean, std, classes, train[0].shape[-1])

    @property
    def channels(self) -> int:
        """Of the images."""
        return self.train.shape[1]

    @property
    def size(self) -> int:
        """Pixels of a side."""
        return self.train.shape[-1]

    def standardized(self, pixels: Tensor) -> Tensor:
        """Other images, as if they were of this set: its resolution, its channels, its mean and std.

        Args:
            pixels: within [0, 1], `(n, channels, height, width)`.
        """
        if pixels.shape[1] != self.channels:
            pixels = pixels.mean(1, keepdim=True).expand(-1, self.channels, -1, -1)
        pixels = resized(pixels.to(self.mean.device), min(self.native, pixels.shape[-1]))
        return (resized(pixels, self.size) - self.mean) / self.std

    def to(self, device: torch.device) -> "Images":
        """All tensors on the device."""
        names = [f.name for f in fields(self) if isinstance(getattr(self, f.name), Tensor)]
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def resized(images: Tensor, size: int) -> Tensor:
    """`(n, channels, size, size)`, single precision."""
    images = images.float()
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=True)
