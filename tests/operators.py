"""torchvision beside a torch for CPUs alone.

Its package on PyPI is built for CUDA: beside another torch its import fails for want of two operators, and so does that
of whatever imports torchvision where it finds it, such as torchmetrics.
"""

import sys

import torch

_LIBRARIES: list[torch.library.Library] = []  # an operator ends with its library


def declare() -> None:
    """Declare the two, without an implementation, if torchvision is there and fails for want of them.

    Classifiers, data sets and transforms work then; what needs the operators, detection, still fails.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)
