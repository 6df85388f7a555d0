"""`varify train`: train a network and its variational twin, evaluate them, write a run folder."""

import argparse
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varify.experiments import toml
from varify.experiments.commands.evaluate import report
from varify.experiments.errors import SettingsError
from varify.experiments.opened import device_of, load_images, other_images, restore
from varify.experiments.options import add_device, add_settings, given_settings
from varify.experiments.progress import Progress
from varify.experiments.runs import Run
from varify.experiments.settings import Settings, flag
from varify.experiments.training import Training
from varify.experiments.training.board import board, check_installed

HELP = "train a network and its variational twin, evaluate them, write a run folder"
EXAMPLES = """examples:
  varify train
  varify train --data mnist --data-root data --download --epochs 5 --hess-init 0.1 --optimizer ivon
  varify train --model mine.networks:make --data folder/of/images --validation 0.1 --augment flip,rotate
  varify train --config settings.toml --seed 1 --out runs/b
  varify train --resume runs/b
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add_settings(parser)
    add_run_options(parser)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Those that are not settings."""
    group = parser.add_argument_group("run")
    group.add_argument("--config", type=Path, metavar="TOML", help="settings from a file; options override it")
    group.add_argument("--out", type=Path, metavar="RUN", help="the run folder (default: runs/, by time)")
    group.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help="go on with an interrupted run, as it was set; --epochs may lengthen it",
    )
    group.add_argument("--quiet", action="store_true", help="no progress")
    add_device(group)  # type: ignore[arg-type]


def do(options: argparse.Namespace) -> int:
    """Train; returns the exit code."""
    training, run, other = _resumed(options) if options.resume is not None else _started(options)
    try:
        _to_the_end(training, run, quiet=options.quiet)
        training.take_best()
        report(training, run, other, quiet=options.quiet)
        return 0
    except KeyboardInterrupt:
        epochs = f"{run.load(torch.device('cpu'))['epoch']} of {training.settings.epochs}"
        print(f"\nvarify: interrupted; {run.folder / 'checkpoint.pt'} holds epoch {epochs}.", file=sys.stderr)
        print(f"Go on with: varify train --resume {run.folder}", file=sys.stderr)
        return 130


def _started(options: argparse.Namespace) -> tuple[Training, Run, Tensor]:
    settings = _settings(options)
    device = device_of(options.device)
    if settings.tensorboard:
        check_installed()
    where = options.out or Path(
        "runs", f"{datetime.now():%Y%m%d-%H%M%S}-{_name(settings.data)}-{_name(settings.model)}"
    )
    Run.check_free(where)
    images = load_images(settings, device)
    other = other_images(settings, images, settings.ood)  # if they are not there: better told now than at the end
    training = Training(settings, images)
    return training, Run.create(where, settings, training.state_dict()), other


def _resumed(options: argparse.Namespace) -> tuple[Training, Run, Tensor]:
    given = given_settings(options)
    others = [name for name in given if name not in ("epochs", "data_root")]
    others += [name for name in ("out", "config") if getattr(options, name) is not None]
    if others:
        flags = ", ".join(f"--{flag(name)}" for name in others)
        raise SettingsError(f"a resumed run keeps its settings and folder; leave out {flags}")
    run, device = Run(options.resume), device_of(options.device)
    before = run.settings()
    settings = replace(before, **given)
    state = run.load(device)
    images = load_images(settings, device)
    other = other_images(settings, images, settings.ood)
    training = Training(settings, images)
    restore(training, state, run)
    if settings.epochs < training.epoch:
        raise SettingsError(f"epochs {settings.epochs}: the run has done {training.epoch} already")
    if settings != before:
        run.save_settings(settings)
    return training, run, other


def _settings(options: argparse.Namespace) -> Settings:
    values: dict[str, Any] = {}
    if options.config is not None:
        values = toml.read(options.config)
        values.pop("run", None)  # which run wrote it
        values = Settings.of(values, str(options.config)).as_dict()
    return Settings(**values | given_settings(options))


def _name(text: str) -> str:
    """Of a data set or a model, as a part of a folder's name."""
    return Path(text.partition(":")[2] or text).name or "data"


def _to_the_end(training: Training, run: Run, *, quiet: bool) -> None:
    settings = training.settings
    title = f"{settings.model} on {settings.data}"
    progress = Progress(title, settings.epochs, training.num_batches, training.epoch, quiet=quiet)
    try:
        with board(run.folder, settings.tensorboard) as write:
            while training.epoch < settings.epochs:
                figures = training.train_epoch(progress.step)
                if training.recorder is not None:
                    run.write("record.npz", training.recorder.file())
                run.save(training.state_dict())
                write(training.epoch, figures)
                progress.epoch(figures)
    finally:
        progress.close()
