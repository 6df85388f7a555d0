"""The parser: an option for every setting, and errors in one line."""

import argparse
from collections.abc import Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from varify.experiments.data import DATA
from varify.experiments.errors import SettingsError, nearest
from varify.experiments.models import MODELS
from varify.experiments.settings import Settings, flag
from varify.experiments.spelling import SCHEDULES

GROUPS = {
    "network and data": ("model", "activation", "networks", "data", "data_root", "download", "size"),
    "images": ("validation", "augment", "ood"),
    "variational": ("prior", "init", "where", "estimator", "beta", "kl_schedule", "train_samples", "n_samples"),
    "optimization": ("optimizer", "lr", "rho_lr", "ivon_lr", "hess_init", "lr_plan", "epochs", "batch_size", "seed"),
    "recording": ("record", "record_per_epoch", "tensorboard"),
}
# What None stands for, in the words of the help.
LIBRARYS = {
    "prior": "the library's, N(0, 1)",
    "init": "the library's, of_weights",
    "where": "all but normalization layers",
    "estimator": "the library's",
    "rho_lr": "5 times lr",
    "activation": "the model's",
    "augment": "none",
    "record": "none",
}
# What a shell completes; a value may be another, such as a folder for data.
VALUES: dict[str, Sequence[str]] = {f.name: f.metadata["among"] for f in fields(Settings) if f.metadata["among"]}
VALUES |= {"model": tuple(MODELS), "data": tuple(DATA), "ood": ("letters", *DATA), "kl_schedule": tuple(SCHEDULES)}
VALUES["estimator"] = ("auto", "weights", "local", "flipout")


class Parser(argparse.ArgumentParser):
    """As argparse's, but what is wrong is a `SettingsError`, and options are not abbreviated."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        """Told like any other."""
        raise SettingsError(f"{message}; see {self.prog} --help")

    def parse(self, arguments: Sequence[str], commands: dict[str, "Parser"]) -> argparse.Namespace:
        """The options.

        Raises:
            SettingsError: one is unknown; the nearest one is named.
        """
        options, unknown = self.parse_known_args(arguments)
        if unknown:
            command = commands[options.command]
            known = [name for action in command._actions for name in action.option_strings]
            word = unknown[0].partition("=")[0]
            raise SettingsError(
                f"varify {options.command} has no option {word}{nearest(word, known)}; see {command.prog} --help"
                if word.startswith("-")
                else f"varify {options.command} doesn't take {word!r}; see {command.prog} --help"
            )
        return options

    def for_completion(self) -> "Parser":
        """This, with the values that options may have as choices, which a shell completes."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    command.for_completion()
            elif action.dest in VALUES:
                action.choices = VALUES[action.dest]
        return self


def add_settings(parser: argparse.ArgumentParser, leave_out: Sequence[str] = ()) -> None:
    """An option for every setting."""
    known = {f.name: f for f in fields(Settings)}
    kinds = get_type_hints(Settings)
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names:
            if name not in leave_out:
                _add(group, known[name], kinds[name])


def _add(group: Any, setting: "Field[Any]", kind: Any) -> None:
    default = LIBRARYS.get(setting.name, setting.default)
    among = setting.metadata["among"]
    text = setting.metadata["help"] + (f": {', '.join(among)}" if among else "")
    options: dict[str, Any] = {"help": f"{text} (default: {default})".replace("%", "%%"), "default": None}
    name = f"--{flag(setting.name)}"
    if kind is bool:
        group.add_argument(name, action="store_true", **options | {"help": text})
        return
    taken = next(k for k in getattr(kind, "__args__", (kind,)) if k is not type(None))
    metavar = {int: "N", float: "X"}.get(taken, "NAME" if among or setting.name == "model" else "TEXT")
    group.add_argument(name, type=taken, metavar=metavar, **options)


def add_run(parser: argparse.ArgumentParser, n_samples: bool = True) -> None:
    """The run folder, and what commands that open one take."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, of `varify train`")
    parser.add_argument("--data-root", metavar="DIR", help="where the data are now (default: as in the run)")
    parser.add_argument("--seed", type=int, metavar="N", help="of the draws (default: that of the run)")
    if n_samples:
        parser.add_argument("--n-samples", type=int, metavar="N", help="draws for a prediction (default: the run's)")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where to compute."""
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Settings that the user wrote down."""
    return {f.name: v for f in fields(Settings) if (v := getattr(options, f.name, None)) is not None}
