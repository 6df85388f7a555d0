"""Ensembles from safetensors files."""

import json
import os

from torch import nn

from varify.errors import FileError
from varify.prediction.ensemble import MEMORY, Ensemble
from varify.serialization import library, load


def load_ensemble(path: str | os.PathLike[str], model: nn.Module, *, memory: int = MEMORY) -> Ensemble:
    """The ensemble that `varify.save` wrote: the same networks, drawn again of its posterior and its seeds.

    `varify.load` reads the posterior of such a file.

    Args:
        path: of the file.
        model: see `varify.load`.
        memory: see `VariationalModule.ensemble`.

    Raises:
        FileError: the file was not written by `varify.save`, or not of an ensemble; further ones as `varify.load`.
    """
    vnet = load(path, model)
    with library().safe_open(path, framework="pt") as file:
        seeds = json.loads(file.metadata()["settings"]).get("seeds")
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and 0 <= seed < 2**63 for seed in seeds):
        raise FileError(
            f"{path} is of a variational module and has no seeds of an ensemble: "
            "varify.load(path, model).ensemble(n_samples) draws one"
        )
    return Ensemble(vnet, seeds, memory)
