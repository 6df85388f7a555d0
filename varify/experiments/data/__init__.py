"""Data sets of the command line, as tensors, and images that are none of their classes."""

from varify.experiments.data.images import Images
from varify.experiments.data.letters import letters
from varify.experiments.data.sets import DATA, digits, load_data, load_other

__all__ = ["DATA", "Images", "digits", "letters", "load_data", "load_other"]
