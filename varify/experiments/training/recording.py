"""Means and standard deviations of chosen weights over a training."""

from fnmatch import fnmatchcase
from io import BytesIO
from typing import Any

import numpy as np
import torch
from torch import Tensor

import varify
from varify.experiments.errors import SettingsError, nearest

MOST = 1000  # weights of a parameter that are recorded, the same ones each time, so that a large layer fills no disk


class Recorder:
    """Mu and sigma of parameters, at steps of the training.

    Args:
        vnet: that is trained.
        globs: on the names of its variational parameters, separated by commas.
        every: steps between recordings.

    Raises:
        SettingsError: a glob matches nothing.
    """

    def __init__(self, vnet: varify.VariationalModule, globs: str, every: int) -> None:
        self._vnet, self._every = vnet, max(every, 1)
        known = list(vnet.posteriors)
        self._rows: dict[str, Tensor] = {}
        for glob in globs.split(","):
            found = [name for name in known if fnmatchcase(name, glob.strip())]
            if not found:
                raise SettingsError(
                    f"record {glob.strip()!r} matches no variational parameter; there are {', '.join(known[:8])}"
                    f"{nearest(glob.strip(), known)}"
                )
            for name in found:
                n = vnet.posteriors[name].mu.numel()
                self._rows[name] = torch.linspace(0, n - 1, min(n, MOST)).round().long()
        self._steps: list[int] = []
        self._values: dict[str, list[Tensor]] = {
            f"{name}/{what}": [] for name in self._rows for what in ("mu", "sigma")
        }

    @torch.no_grad()
    def at(self, step: int) -> None:
        """Record, if it is time; steps count from 0."""
        if step % self._every:
            return
        self._steps.append(step)
        for name, rows in self._rows.items():
            q = self._vnet.posteriors[name]
            for what, value in (("mu", q.mu), ("sigma", q.sigma)):
                self._values[f"{name}/{what}"].append(value.detach().flatten()[rows.to(value.device)].cpu())

    def arrays(self) -> dict[str, Any]:
        """`step`, `(times,)`, and `NAME/mu` and `NAME/sigma`, each `(times, weights)`."""
        values = {name: torch.stack(rows).numpy() for name, rows in self._values.items() if rows}
        return {"step": np.asarray(self._steps), **values}

    def file(self) -> bytes:
        """The arrays as an npz file."""
        buffer = BytesIO()
        np.savez_compressed(buffer, **self.arrays())
        return buffer.getvalue()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"steps": list(self._steps), "values": {n: torch.stack(r) for n, r in self._values.items() if r}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a saved state."""
        self._steps = list(state["steps"])
        for name in self._values:
            self._values[name] = [row.cpu() for row in state["values"].get(name, [])]
