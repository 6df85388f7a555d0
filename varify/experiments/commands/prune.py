"""`varify prune`: accuracy and NLL against the share of the weights that is pruned."""

import argparse

import varify
from varify import plots
from varify.experiments.commands.evaluate import evaluations
from varify.experiments.errors import SettingsError
from varify.experiments.opened import device_of, open_run
from varify.experiments.options import add_run
from varify.experiments.pictures import grid, png

HELP = "prune a run's weights by signal to noise: accuracy and NLL against the share pruned"
EXAMPLES = """examples:
  varify prune runs/a
  varify prune runs/a --fractions 0 0.5 0.75 0.9 --where "fc*"
"""
FRACTIONS = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98)


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add_run(parser)
    told = " ".join(map(str, FRACTIONS))
    parser.add_argument("--fractions", type=float, nargs="+", default=FRACTIONS, metavar="X", help=f"(default: {told})")
    parser.add_argument("--where", default="*", metavar="GLOB", help="parameters to prune (default: all)")


def do(options: argparse.Namespace) -> int:
    """Print a table, write a picture and a JSON file into the run folder."""
    if any(not 0 <= fraction <= 1 for fraction in options.fractions):
        raise SettingsError("fractions must be shares of the weights, within [0, 1]")
    opened = open_run(options.run, device_of(options.device), data_root=options.data_root, n_samples=options.n_samples)
    vnet = opened.variational
    seed = opened.settings.seed if options.seed is None else options.seed
    other, n_samples = opened.other(opened.settings.ood), opened.settings.n_samples
    found: list[dict[str, float]] = []

    def merit(pruned: varify.VariationalModule) -> float:
        name = f"pruned, {len(found) + 1} of {len(options.fractions)}"
        evaluation = evaluations({name: pruned}, opened.images, other, n_samples, seed, quiet=options.quiet)[name]
        found.append(evaluation.metrics)
        return found[-1]["accuracy"]

    curve = varify.pruning_curve(vnet, merit, options.fractions, where=options.where)
    rows = [{"pruned": share, **metrics} for (share, _), metrics in zip(curve, found, strict=True)]
    print(f"{'pruned':>8}{'accuracy':>12}{'NLL (nats)':>12}{'ECE':>12}")
    for row in rows:
        print(f"{row['pruned']:8.3f}{row['accuracy']:12.4f}{row['nll']:12.4f}{row['ece']:12.4f}")
    figure, axes = grid(1, 3)
    plots.pruning_curve(curve, ax=axes[0, 0])
    plots.pruning_curve([(row["pruned"], row["nll"]) for row in rows], ylabel="NLL (nats)", ax=axes[0, 1])
    plots.snr(vnet, where=options.where, ax=axes[0, 2])
    opened.run.write_json("pruning.json", {"where": options.where, "seed": seed, "curve": rows})
    opened.run.write("pruning.png", png(figure))
    print(f"wrote pruning.json and pruning.png to {opened.run.folder}")
    return 0
