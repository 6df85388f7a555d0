"""Random changes of training images that leave their class as it is."""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

KINDS = ("flip", "rotate", "shift")
DEGREES, SHIFT = 10.0, 0.125


def augmented(images: Tensor, kinds: list[str], generator: Generator) -> Tensor:
    """Each image with a change of its own, in one interpolation.

    Args:
        images: `(n, channels, size, size)`, standardized: what comes in from outside has their mean, 0.
        kinds: of `KINDS`: left-right flips, rotations of up to 10 degrees, shifts of up to an eighth of the side.
        generator: on the CPU.
    """
    n = len(images)
    flip, turn, shift = (float(kind in kinds) for kind in KINDS)
    sign = 1 - 2 * flip * (torch.rand(n, generator=generator) < 0.5).float()
    angle = turn * math.radians(DEGREES) * (2 * torch.rand(n, generator=generator) - 1)
    # coordinates run from -1 to 1, so a shift by a share of the side counts twice
    by = shift * 2 * SHIFT * (2 * torch.rand(n, 2, generator=generator) - 1)
    rows = [torch.stack([sign * angle.cos(), -angle.sin(), by[:, 0]], 1)]
    rows.append(torch.stack([sign * angle.sin(), angle.cos(), by[:, 1]], 1))
    grid = F.affine_grid(torch.stack(rows, 1).to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
