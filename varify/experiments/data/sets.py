"""The data sets that have names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varify.experiments.data.files import folder, images_below
from varify.experiments.data.images import SIZE, Images
from varify.experiments.data.letters import letters
from varify.experiments.errors import INSTALL, DataError, nearest


def digits(root: Path, download: bool = False, size: int = SIZE) -> Images:
    """The 1,797 digits of 8×8 that come with scikit-learn; every fourth is held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels, labels = torch.as_tensor(data.images / 16.0)[:, None], torch.as_tensor(data.target)
    held_out = torch.arange(len(labels)) % 4 == 3
    train, test = ((pixels[rows], labels[rows]) for rows in (~held_out, held_out))
    return Images.of(train, test, tuple(map(str, range(10))), size)


def _torchvision(name: str, classes: range | None = None) -> Callable[..., Images]:
    """The loader of a set that torchvision has; `classes`: of these alone, with labels from 0."""

    def load(root: Path, download: bool = False, size: int = SIZE) -> Images:
        train, test = (_part(name, root, part, download) for part in (True, False))
        names = tuple(str(c) for c in train.classes)
        parts = [_pixels(part) for part in (train, test)]
        if classes is not None:
            inside = [(y >= classes.start) & (y < classes.stop) for _, y in parts]
            parts = [(x[rows], y[rows] - classes.start) for (x, y), rows in zip(parts, inside, strict=True)]
            names = names[classes.start : classes.stop]
        return Images.of(parts[0], parts[1], names, size)

    return load


def _part(name: str, root: Path, train: bool, download: bool) -> Any:
    try:
        from torchvision import datasets
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise DataError(f"{name} needs torchvision, which lacks a module: {error}") from error
        raise DataError(f"{name} needs torchvision, which is not installed: {INSTALL.format('vision')}") from error
    except (ImportError, RuntimeError, OSError) as error:
        told = str(error).splitlines()[0]
        raise DataError(
            f"{name} needs torchvision; the one that is installed can't be imported ({told}): install one built for "
            f"torch {torch.__version__}"
        ) from error
    try:
        return getattr(datasets, name)(root, train=train, download=download)
    except (OSError, RuntimeError) as error:
        if download:
            raise DataError(f"{name} can't be downloaded to {root}: {str(error).splitlines()[0]}") from error
        raise DataError(
            f"{name} is not in {root}: add --download, or give --data-root the folder in which torchvision keeps it"
        ) from error


def _pixels(part: Any) -> tuple[Tensor, Tensor]:
    pixels = torch.as_tensor(part.data)
    pixels = pixels[:, None] if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)
    return pixels / 255.0, torch.as_tensor(part.targets)


DATA: dict[str, Callable[..., Images]] = {
    "digits": digits,
    "mnist": _torchvision("MNIST"),
    "fashion-mnist": _torchvision("FashionMNIST"),
    "cifar10": _torchvision("CIFAR10"),
    "cifar100": _torchvision("CIFAR100"),
    "split-mnist-1": _torchvision("MNIST", range(5)),
    "split-mnist-2": _torchvision("MNIST", range(5, 10)),
}


def load_data(name: str, root: Path, download: bool = False, size: int = SIZE) -> Images:
    """A data set by its name, or from a folder.

    Raises:
        DataError: it can't be had.
    """
    if name in DATA:
        return DATA[name](root, download, size)
    if Path(name).is_dir():
        return folder(Path(name), size)
    raise DataError(f"data {name!r} is neither a folder nor one of {', '.join(DATA)}{nearest(name, DATA)}")


def load_other(name: str, like: Images, root: Path, download: bool = False) -> Tensor:
    """Images of another kind, as a network of the data set `like` takes them: letters, a set's test images, a folder.

    Raises:
        DataError: they can't be had.
    """
    if name == "letters":
        return like.standardized(letters(like.native)[:, None].float())
    if name in DATA:
        other = DATA[name](root, download)
        return like.standardized(other.test * other.std + other.mean)
    if Path(name).is_dir():
        return like.standardized(images_below(Path(name), like.size))
    known = ["letters", *DATA]
    raise DataError(f"{name!r} is neither a folder nor one of {', '.join(known)}{nearest(name, known)}")
