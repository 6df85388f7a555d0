"""`varify diagnose`: what is wrong with a run's variational network, and what to change."""

import argparse

import torch
import torch.nn.functional as F

import varify
from varify.experiments.opened import device_of, open_run
from varify.experiments.options import add_run

HELP = "say what is wrong with a run's variational network and its training, and what to change"
EXAMPLES = "example:\n  varify diagnose runs/a\n"


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add_run(parser, n_samples=False)


def do(options: argparse.Namespace) -> int:
    """Print it."""
    opened = open_run(options.run, device_of(options.device), data_root=options.data_root)
    training, vnet, settings = opened.training, opened.variational, opened.settings
    torch.manual_seed(settings.seed if options.seed is None else options.seed)
    images, labels = training.training_set()
    n = settings.batch_size
    beta = settings.beta if settings.beta == "auto" else float(settings.beta)
    print(vnet.summary())
    print()
    print(
        varify.diagnose(
            vnet.train(),
            list(zip(images.split(n), labels.split(n), strict=True)),
            F.cross_entropy,
            num_data=training.num_data,
            beta=beta,
        )
    )
    return 0
