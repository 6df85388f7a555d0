"""The picture of the first page, light and dark: `python -m docs.picture` runs the README's code and draws it."""

import re
from pathlib import Path

import matplotlib as mpl
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor, nn

import varify

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "docs" / "assets"
INK = {"light": "#24292f", "dark": "#d0d7de"}
STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}


def code() -> str:
    """The README's first block of Python."""
    found = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert found is not None
    return found[1]


def plain_line(net: nn.Module, x: Tensor, y: Tensor, grid: Tensor) -> Tensor:
    """What the network says when it is trained in the ordinary way, `(len(grid), 1)`."""
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(1000):
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        return net(grid)


def draw(names: dict[str, object], line: Tensor, ink: str) -> Axes:
    """The README's axis again, with the data, the plain network's line, and this color for what is written."""
    x, y, grid = (names[name] for name in ("x", "y", "grid"))
    style = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), ink)
    with mpl.rc_context(STYLE | style):
        ax = plt.subplots(figsize=(7.2, 3.2), layout="constrained")[1]
        varify.plots.intervals(grid, names["pred"], likelihood=names["likelihood"], ax=ax)
        ax.plot(grid, line, "--", color="#e8590c", label="plain network")
        ax.plot(x, y, ".", color=ink, markersize=4, label="data")
        ax.set(ylim=(-4, 4), xlim=(-5, 5))
        ax.legend(fontsize="small", frameon=False, loc="upper right", ncols=2)
    return ax


def main() -> None:
    """Write `docs/assets/intervals-light.png` and `-dark.png`."""
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(code(), names)
    names["pred"] = names["vnet"].predict(names["grid"], n_samples=500, seed=0)
    line = plain_line(names["net"], names["x"], names["y"], names["grid"])
    ASSETS.mkdir(exist_ok=True)
    for name, ink in INK.items():
        figure = draw(names, line, ink).figure
        figure.savefig(ASSETS / f"intervals-{name}.png", dpi=120, transparent=True)
    plt.close("all")


if __name__ == "__main__":
    mpl.use("agg")
    main()
