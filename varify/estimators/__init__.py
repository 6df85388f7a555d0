"""Gradient estimators. A custom rule is one decorated function; see `rule`."""

from varify.estimators import flipout, local  # noqa: F401  # they register their rules
from varify.estimators.rules import rule
from varify.weights.moments import Moments

__all__ = ["Moments", "rule"]
