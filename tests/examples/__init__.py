"""Worked examples: `python -m tests.examples.with_lightning`, `python -m tests.examples.with_transformers`."""

from tests import operators

operators.declare()  # where torchvision is there, but not built for this torch
