"""Images from a folder of one's own: a folder for each class, idx files as MNIST's, or images alone."""

import gzip
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varify.experiments.data.images import Images
from varify.experiments.errors import DataError

KINDS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
PARTS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}
LAYOUT = "train/CLASS/*.png and test/CLASS/*.png, CLASS/*.png (every fifth is held out), or idx files as MNIST's"
Labeled = tuple[Tensor, Tensor]


def folder(path: Path, size: int) -> Images:
    """The data set in a folder; see `LAYOUT`.

    Raises:
        DataError: it has none of these, or the classes of its parts differ.
    """
    idx = {part: _idx(path, part) for part in PARTS}
    if idx["train"] and idx["test"]:
        number = int(max(labels.max() for _, labels in (idx["train"], idx["test"]))) + 1
        return Images.of(idx["train"], idx["test"], tuple(map(str, range(number))), size)
    parts = {part: next((path / n for n in names if (path / n).is_dir()), None) for part, names in PARTS.items()}
    if parts["train"] and parts["test"]:
        classes = {part: _classes(where) for part, where in parts.items() if where}
        if classes["train"] != classes["test"]:
            odd = sorted(set(classes["train"]) ^ set(classes["test"]))
            raise DataError(f"{path}: training and test data must have the same classes; {', '.join(odd[:5])} differ")
        train, test = _same_channels(*(_labeled(where, classes["train"], size) for where in parts.values() if where))
        return Images.of(train, test, tuple(classes["train"]), size)
    names = _classes(path) if path.is_dir() else []
    if len(names) < 2:
        raise DataError(f"{path} has no images in folders of at least two classes; wanted: {LAYOUT}")
    pixels, labels = _labeled(path, names, size)
    held_out = torch.arange(len(labels)) % 5 == 4
    train, test = ((pixels[rows], labels[rows]) for rows in (~held_out, held_out))
    return Images.of(train, test, tuple(names), size)


def images_below(path: Path, size: int) -> Tensor:
    """All images in a folder and the folders in it, or the test images of idx files, `(n, channels, h, w)`."""
    found = _idx(path, "test") or _idx(path, "train")
    if found:
        return found[0]
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in KINDS) if path.is_dir() else []
    pixels, _ = _read(files, [0] * len(files), size, path)
    return pixels


def _classes(path: Path) -> list[str]:
    return sorted(d.name for d in path.iterdir() if d.is_dir() and any(f.suffix.lower() in KINDS for f in d.iterdir()))


def _labeled(path: Path, classes: list[str], size: int) -> Labeled:
    pairs = [(f, i) for i, c in enumerate(classes) for f in sorted((path / c).iterdir()) if f.suffix.lower() in KINDS]
    return _read([f for f, _ in pairs], [i for _, i in pairs], size, path)


def _read(files: list[Path], labels: list[int], size: int, path: Path) -> Labeled:
    """Pixels within [0, 1] and labels; what is no image is left out, and said."""
    from PIL import Image, UnidentifiedImageError

    found, kept, broken = [], [], []
    for file, label in zip(files, labels, strict=True):
        try:
            with Image.open(file) as image:
                pixels = _pixels(image, size)
        except (OSError, UnidentifiedImageError, ValueError, DataError) as error:
            broken.append(f"{file} ({error})")
            continue
        found.append(pixels.reshape(size, size, -1).transpose(2, 0, 1))
        kept.append(label)
    unread = f"{len(broken)} of {len(files)} files can't be read, such as {broken[0]}" if broken else ""
    if not found:
        raise DataError(f"{path} has no images{f': {unread}' if unread else ''}; wanted: {LAYOUT}")
    if unread:
        print(f"varify: {unread}", file=sys.stderr)
    most = max(len(pixels) for pixels in found)
    stacked = np.stack([np.broadcast_to(pixels, (most, size, size)) for pixels in found])
    return torch.as_tensor(stacked), torch.tensor(kept)


def _pixels(image: Any, size: int) -> np.ndarray:
    """Within [0, 1], `(size, size)` or with three channels last."""
    if image.mode in ("I", "F"):
        raise DataError(f"its pixels are of Pillow's mode {image.mode}, of which nothing says what is white")
    if image.mode.startswith("I;16"):
        kind, white = "F", 65535  # converted to bytes, all above 255 would be white
    else:
        kind, white = "L" if image.mode in ("1", "L") else "RGB", 255
    resized = image.convert(kind).resize((size, size), 2)  # bilinear
    return np.asarray(resized, np.float32) / np.float32(white)


def _same_channels(*sets: Labeled) -> list[Labeled]:
    most = max(pixels.shape[1] for pixels, _ in sets)
    return [(pixels.expand(-1, most, -1, -1), labels) for pixels, labels in sets]


def _idx(path: Path, part: str) -> Labeled | None:
    """Images and labels of a part, `train` or `test`, from files as MNIST's; None where they are not there."""
    prefix = {"train": "train", "test": "t10k"}[part]
    for where in (path, path / "raw"):
        arrays = [_array(where, f"{prefix}-{what}-ubyte") for what in ("images-idx3", "labels-idx1")]
        if arrays[0] is not None and arrays[1] is not None:
            return torch.as_tensor(arrays[0])[:, None] / 255.0, torch.as_tensor(arrays[1]).long()
    return None


def _array(where: Path, name: str) -> np.ndarray | None:
    """An idx file's content: two zeros, the type (8: bytes), the number of dimensions, the sizes, the bytes."""
    for file in (where / name, where / f"{name}.gz"):
        if file.is_file():
            content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
            start = 4 + 4 * content[3] if len(content) > 3 else 4
            sizes = np.frombuffer(content[4:start].ljust(start - 4, b"\xff"), ">i4").astype(int)
            if content[:3] != b"\0\0\x08" or (sizes < 0).any() or len(content) != start + sizes.prod():
                raise DataError(f"{file} is no idx file of bytes, or is cut; download it again")
            return np.frombuffer(content, np.uint8, offset=start).reshape(sizes).copy()
    return None
