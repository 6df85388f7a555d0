"""`varify evaluate`: the figures of a run again, from its checkpoint."""

import argparse
from collections.abc import Mapping

from torch import Tensor, nn

from varify.experiments.data import Images
from varify.experiments.evaluation import Evaluation, evaluate
from varify.experiments.opened import device_of, open_run
from varify.experiments.options import add_run
from varify.experiments.pictures import of_evaluations
from varify.experiments.runs import Run
from varify.experiments.training import Training

HELP = "print the figures of a run again, from its checkpoint"
EXAMPLES = "example:\n  varify evaluate runs/a --n-samples 200\n"
TITLES = {
    "accuracy": "accuracy",
    "nll": "NLL (nats)",
    "ece": "ECE",
    "brier": "Brier",
    "ood_auroc": "OOD AUROC",
}


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add_run(parser)
    parser.add_argument("--ood", metavar="NAME|DIR", help="images of another kind (default: as in the run)")


def do(options: argparse.Namespace) -> int:
    """Print them."""
    opened = open_run(
        options.run,
        device_of(options.device),
        data_root=options.data_root,
        n_samples=options.n_samples,
        ood=options.ood,
    )
    seed = opened.settings.seed if options.seed is None else options.seed
    other = opened.other(opened.settings.ood)
    show(evaluations(opened.networks, opened.images, other, opened.settings.n_samples, seed, quiet=options.quiet))
    return 0


def report(training: Training, run: Run, other: Tensor, *, quiet: bool) -> None:
    """Evaluate a finished training, print it, and write it into the run folder."""
    networks = {name: learner.network for name, learner in training.learners.items()}
    settings = training.settings
    found = evaluations(networks, training.images, other, settings.n_samples, settings.seed, quiet=quiet)
    show(found)
    run.write_json(
        "metrics.json",
        {
            "settings": settings.as_dict(),
            "epoch": training.epoch,
            "best_epoch": {name: best[0] for name, best in training.best.items()},
            "seconds": {name: learner.seconds for name, learner in training.learners.items()},
            "metrics": {name: evaluation.metrics for name, evaluation in found.items()},
        },
    )
    run.write("picture.png", of_evaluations(found, settings.ood))
    print(f"wrote settings.toml, checkpoint.pt, metrics.json and picture.png to {run.folder}")


def evaluations(
    networks: Mapping[str, nn.Module], images: Images, other: Tensor, n_samples: int, seed: int, *, quiet: bool
) -> dict[str, Evaluation]:
    """By name of the network."""
    held_out = (images.test, images.test_labels)
    return {
        name: evaluate(network, held_out, other, n_samples, seed, None if quiet else f"predictions, {name}")
        for name, network in networks.items()
    }


def show(found: dict[str, Evaluation]) -> None:
    """Print a table."""
    print(f"{'':12}" + "".join(f"{title:>12}" for title in TITLES.values()))
    for name, evaluation in found.items():
        print(f"{name:12}" + "".join(f"{evaluation.metrics[key]:12.6f}" for key in TITLES))
