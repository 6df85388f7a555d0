"""Analyses of a trained variational network."""
