"""The axis to draw into, and the colors."""

from typing import Any

Axis = Any  # matplotlib's Axes, whose name can't be imported: the package is optional
BLUE, ORANGE, GREY = "tab:blue", "tab:orange", "0.5"


def axis(ax: Axis | None) -> Axis:
    """`ax`, or the axis of a new figure of pyplot's.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError('varify.plots needs matplotlib: pip install "torch-varify[plots]"') from error
    return pyplot.subplots(layout="constrained")[1]
