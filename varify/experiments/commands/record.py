"""`varify record`: `varify train` that records means and standard deviations of chosen weights."""

import argparse

from varify.experiments.commands import train
from varify.experiments.options import add_settings

HELP = "train as `varify train`, and record means and stds of chosen layers for `varify plot`"
EXAMPLES = """examples:
  varify record "conv1.weight" "fc*" --out runs/c
  varify plot runs/c
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("layers", nargs="+", metavar="GLOB", help="on names of parameters, such as conv1.weight or fc*")
    add_settings(parser, leave_out=("record",))
    train.add_run_options(parser)


def do(options: argparse.Namespace) -> int:
    """Train."""
    options.record = ",".join(options.layers)
    return train.do(options)
