"""`varify mdl`: the bits that weights and labels take (minimum description length)."""

import argparse
import math

import torch
import torch.nn.functional as F

import varify
from varify.experiments.opened import device_of, open_run
from varify.experiments.options import add_run

HELP = "tell the description length of a run: bits for the weights, and for the labels given these"
EXAMPLES = "example:\n  varify mdl runs/a\n"
BATCH = 500


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add_run(parser)


def do(options: argparse.Namespace) -> int:
    """Print it, write a JSON file into the run folder."""
    opened = open_run(options.run, device_of(options.device), data_root=options.data_root, n_samples=options.n_samples)
    torch.manual_seed(opened.settings.seed if options.seed is None else options.seed)
    images, labels = opened.training.training_set()
    batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    found = varify.description_length(opened.variational, batches, F.cross_entropy, n_samples=opened.settings.n_samples)
    print(found)
    alone = len(labels) * math.log2(len(opened.images.classes))
    print(f"The labels alone take {alone:,.1f} bits, {alone / 8:,.1f} bytes, with a code that knows nothing.")
    print("The weights take their KL, whatever its weight was in training: --beta 1 trains for the shortest code.")
    opened.run.write_json(
        "mdl.json",
        {"bits": {"weights": found.weights, "data": found.data, "total": found.total, "labels alone": alone}},
    )
    print(f"wrote mdl.json to {opened.run.folder}")
    return 0
