"""Optimizers of mu and rho together."""

from varify.optim.ivon import IVON

__all__ = ["IVON"]
