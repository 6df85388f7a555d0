"""Priors and schedules as one word: `name`, `name:key=value,key=value`, `name:number`."""

from collections.abc import Callable

from varify import VarifyError, priors, schedules
from varify.experiments.errors import SettingsError, nearest

# By name: what the number after the colon means, and its default.
SCHEDULES = {"constant": ("", None), "warm-up": ("share", 0.25), "cyclical": ("cycles", 4.0), "blundell": ("", None)}
Schedule = Callable[[int], float]


def parsed_prior(text: str) -> priors.Prior:
    """The prior that is meant.

    Raises:
        SettingsError: there is none.
    """
    name, _, rest = text.partition(":")
    hyperparameters: dict[str, float] = {}
    for pair in rest.split(",") if rest else []:
        key, _, value = (part.strip() for part in pair.partition("="))
        try:
            hyperparameters[key] = int(value) if key == "n_mc_samples" else float(value)
        except ValueError:
            raise SettingsError(f"prior {text!r}: {pair!r} must be key=number, as in {name}:{key}=0.5") from None
    try:
        return priors.as_prior(name, **hyperparameters)
    except VarifyError as error:
        if name not in priors.names():  # of which the error tells already
            raise SettingsError(f"{error}{nearest(name, priors.names())}") from None
        told = str(error).removeprefix(f"prior {name!r}: ")
        raise SettingsError(f"prior {text!r}: {told}") from None


def parsed_schedule(text: str) -> tuple[str, float | None]:
    """Name and number of a schedule of the KL's weight.

    Raises:
        SettingsError: there is no such one, or the number can't be.
    """
    name, _, rest = text.partition(":")
    if name not in SCHEDULES:
        raise SettingsError(
            f"kl-schedule {name!r} is unknown; there are {', '.join(SCHEDULES)}{nearest(name, SCHEDULES)}"
        )
    what, number = SCHEDULES[name]
    if rest:
        try:
            number = float(rest)
        except ValueError:
            number = -1.0
        if not what or number <= 0 or (what == "share" and number > 1):
            takes = {
                "": "takes no number",
                "share": "takes a share within (0, 1]",
                "cycles": "takes a number of cycles",
            }
            raise SettingsError(f"kl-schedule {text!r}: {name} {takes[what]}")
    return name, number


def schedule(text: str, steps: int, num_batches: int) -> Schedule:
    """What the KL's weight is multiplied by at a step.

    Args:
        text: see `parsed_schedule`.
        steps: of the whole training.
        num_batches: steps of an epoch.
    """
    name, number = parsed_schedule(text)
    if name == "warm-up":
        return schedules.warm_up(max(round((number or 1.0) * steps), 1))
    if name == "cyclical":
        return schedules.cyclical(max(round(steps / (number or 1.0)), 1))
    return schedules.blundell(num_batches) if name == "blundell" else schedules.uniform(num_batches)
