"""Mean and variance of every output in one pass. A rule for an operation is one decorated function; see `rule`."""

from varify.propagation import (  # noqa: F401  # they register their rules
    activations,
    arithmetic,
    normalization,
    pooling,
    products,
    shapes,
    softmax,
)
from varify.propagation.rules import Uncertain, rule

__all__ = ["Uncertain", "rule"]
