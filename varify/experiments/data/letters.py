"""Letters A to J, which are no digits and no clothes: what a network trained on these should be uncertain about."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor


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
