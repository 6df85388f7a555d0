"""What must be in place before anything is imported."""

import os

import pytest
import torch

from tests import operators

if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each; so for the processes that they start
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

operators.declare()  # timm, transformers, lightning and torchmetrics import torchvision


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws doesn't depend on which tests came before it, nor on how they were shared out."""
    torch.manual_seed(0)
