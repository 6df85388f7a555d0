"""The command line: `varify train` and `varify evaluate`."""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from varify import VarifyError, __version__
from varify.experiments.data import DATA, DataError, Images
from varify.experiments.evaluation import Evaluation, evaluate
from varify.experiments.models import MODELS
from varify.experiments.plots import picture
from varify.experiments.runs import Run, RunError
from varify.experiments.settings import PRIOR_DEFAULTS, Settings, SettingsError
from varify.experiments.training import Twins

TITLES = {"accuracy": "accuracy", "nll": "NLL (nats)", "ece": "ECE", "letters_auroc": "letters AUROC"}


def run(arguments: Sequence[str]) -> int:
    """Do what the arguments say; returns the exit code. What goes wrong is one line on standard error."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.do(options))
    except (RunError, SettingsError, DataError, VarifyError) as error:
        print(f"varify: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="varify", description="Train a network and its variational twin.")
    parser.add_argument("--version", action="version", version=f"varify {__version__}")
    commands = parser.add_subparsers(required=True, metavar="train | evaluate")
    defaults = Settings()

    train = commands.add_parser("train", help="train both, evaluate them, write a run folder")
    train.set_defaults(do=_train)
    train.add_argument("--model", help=f"{', '.join(MODELS)} (default {defaults.model})")
    train.add_argument("--data", help=f"{', '.join(DATA)} (default {defaults.data})")
    train.add_argument("--data-root", metavar="DIR", help="where torchvision keeps its data (default data)")
    priors = "gaussian, " + ", ".join(PRIOR_DEFAULTS)
    train.add_argument("--prior", help=f"{priors}, or as in mixtgauss:sigma_1=1,sigma_2=0.01,pi=0.5 (default gaussian)")
    for name, meaning in (
        ("epochs", "passes over the data"),
        ("batch-size", "images a step"),
        ("lr", "learning rate of weights and means"),
        ("rho-lr", "learning rate of the rho's"),
        ("beta", "weight of the KL; 1 is the evidence lower bound"),
        ("n-samples", "draws for a prediction"),
        ("seed", "of everything random"),
    ):
        default = getattr(defaults, name.replace("-", "_"))
        train.add_argument(f"--{name}", type=type(default), help=f"{meaning} (default {default})")
    train.add_argument("--out", type=Path, metavar="RUN", help="the run folder (default runs/, by time)")
    train.add_argument("--resume", type=Path, metavar="RUN", help="go on with an interrupted run, as it was set")
    train.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")

    again = commands.add_parser("evaluate", help="print the figures of a run again, from its checkpoint")
    again.set_defaults(do=_evaluate)
    again.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    again.add_argument("--seed", type=int, help="of the draws (default: that of the run)")
    again.add_argument("--n-samples", type=int, help="draws for a prediction (default: that of the run)")
    again.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    return parser


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """Settings that the user wrote down."""
    return {f.name: v for f in fields(Settings) if (v := getattr(options, f.name, None)) is not None}


def _train(options: argparse.Namespace) -> int:
    device = _device(options.device)
    given = _given(options)
    if options.resume is not None:
        if given or options.out:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in [*given, *(["out"] if options.out else [])])
            raise SettingsError(f"a resumed run keeps its settings and folder; leave out {flags}")
        folder = Run(options.resume)
        settings = folder.settings()
        state = folder.load(device)
        images = _images(settings, device)
        twins = Twins(settings, device)
        _restore(twins, state, folder)
    else:
        settings = Settings(**given)
        images = _images(settings, device)
        twins = Twins(settings, device)
        name = f"{datetime.now():%Y%m%d-%H%M%S}-{settings.data}-{settings.model}"
        folder = Run.create(options.out or Path("runs", name), settings)
        try:
            folder.save(twins.state_dict())
        except RunError:
            folder.discard()
            raise
    try:
        _train_to_the_end(twins, images, folder)
    except KeyboardInterrupt:
        held = f"{folder.folder / 'checkpoint.pt'} holds epoch {twins.epoch} of {settings.epochs}"
        print(f"\nvarify: interrupted; {held}.\nGo on with: varify train --resume {folder.folder}", file=sys.stderr)
        return 130
    _report(twins, images, folder)
    print(f"wrote checkpoint.pt, metrics.json and picture.png to {folder.folder}")
    return 0


def _train_to_the_end(twins: Twins, images: Images, folder: Run) -> None:
    settings = twins.settings
    steps = -(-len(images.train) // settings.batch_size)
    description = f"{settings.model} and its variational twin on {settings.data}"
    with tqdm(total=settings.epochs * steps, initial=twins.epoch * steps, desc=description, unit="step") as bar:

        def show(plain: float, variational: float) -> None:
            bar.set_postfix(plain=f"{plain:.3f}", variational=f"{variational:.3f}", refresh=False)
            bar.update()

        while twins.epoch < settings.epochs:
            twins.train_epoch(images, show)
            folder.save(twins.state_dict())


def _evaluate(options: argparse.Namespace) -> int:
    device = _device(options.device)
    folder = Run(options.run)
    settings = folder.settings()
    state = folder.load(device)
    twins = Twins(settings, device)
    _restore(twins, state, folder)
    twins.settings = replace(settings, **_given(options))
    images = _images(settings, device)
    _print(_both(twins, images))
    return 0


def _report(twins: Twins, images: Images, folder: Run) -> None:
    evaluations = _both(twins, images)
    _print(evaluations)
    metrics = {name: evaluation.metrics for name, evaluation in evaluations.items()}
    report = {"settings": twins.settings.as_dict(), "epoch": twins.epoch, "metrics": metrics}
    folder.write("metrics.json", json.dumps(report, indent=2).encode())
    folder.write("picture.png", picture(evaluations))


def _both(twins: Twins, images: Images) -> dict[str, Evaluation]:
    s = twins.settings
    networks = {"plain": twins.plain, "variational": twins.variational}
    return {name: evaluate(network, images, s.n_samples, s.seed) for name, network in networks.items()}


def _print(evaluations: dict[str, Evaluation]) -> None:
    print(f"{'':12}" + "".join(f"{title:>15}" for title in TITLES.values()))
    for name, evaluation in evaluations.items():
        print(f"{name:12}" + "".join(f"{evaluation.metrics[key]:15.6f}" for key in TITLES))


def _restore(twins: Twins, state: dict[str, Any], folder: Run) -> None:
    try:
        twins.load_state_dict(state)
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        text = str(error).strip().splitlines()[0]
        raise RunError(f"{folder.folder / 'checkpoint.pt'} does not fit settings.json: {text}") from error


def _images(settings: Settings, device: torch.device) -> Images:
    loaded = DATA[settings.data](Path(settings.data_root))
    return Images(**{field.name: getattr(loaded, field.name).to(device) for field in fields(Images)})


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            device = torch.device(name)
            torch.zeros(1, device=device)
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SettingsError(f"device {name!r} can't be used: {str(error).splitlines()[0]}") from error
