"""What must be in place before anything is imported."""

import os

import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each; so for the processes that they start
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

if not torch.cuda.is_available():
    # torchvision has no build for CPUs alone: beside such a torch its import fails for want of two operators, which
    # are declared here, without an implementation. What needs them (detection) still fails.
    _torchvision = torch.library.Library("torchvision", "FRAGMENT")  # kept: it ends with the reference
    for _operator in ("nms", "qnms"):
        _torchvision.define(_operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
