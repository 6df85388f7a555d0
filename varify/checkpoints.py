"""Priors, estimators and masks from a checkpoint, all checked before anything is made of them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from varify.errors import EstimatorError, PriorError, StructureError, listed
from varify.estimators.rules import check_estimator
from varify.priors.registry import KINDS
from varify.weights.prior import Prior, is_room


class Restored(NamedTuple):
    """What a checkpoint says of the parameters that are here, by name.

    Attributes:
        priors: beside the parameters; tensors of theirs have no values yet.
        estimators: the names of these.
        fixed: parameters that have a mask of fixed weights.
    """

    priors: dict[str, Prior]
    estimators: dict[str, str]
    fixed: list[str]


def restored(state: Any, rhos: Mapping[str, Tensor]) -> Restored:
    """What the extra state of a checkpoint says.

    Args:
        state: of `VariationalModule.get_extra_state`, out of a file that anybody may have written.
        rhos: of the parameters, `(*shape)` each. Names that are not among them are left to torch's report of keys.

    Raises:
        StructureError: it is no such state.
        PriorError: a prior is unknown, or has settings that can't be, or a shape that doesn't fit its parameter's.
        EstimatorError: an estimator is unknown.
    """
    for part, kind in (("priors", dict), ("estimators", dict), ("fixed", list)):
        if not isinstance(state, Mapping) or not isinstance(state.get(part), kind):
            raise StructureError(f"the checkpoint's extra state has no {kind.__name__} of {part}; varify wrote no such")
    made = {name: _prior(name, told, rhos.get(name)) for name, told in state["priors"].items()}
    chosen = {name: _estimator(name, told) for name, told in state["estimators"].items() if name in rhos}
    fixed = [name for name in rhos if name in state["fixed"]]
    return Restored({name: prior for name, prior in made.items() if prior is not None}, chosen, fixed)


def _prior(name: str, told: Any, rho: Tensor | None) -> Prior | None:
    """The prior of a parameter; None without one."""
    kind = told.get("kind") if isinstance(told, Mapping) else None
    if not isinstance(kind, str):
        raise PriorError(f"the checkpoint's prior of {name} is {str(told)[:99]}, not settings with a kind")
    if kind not in KINDS:
        raise PriorError(
            f"the checkpoint has a prior of kind {kind!r} for {name}; import the module that registers it before "
            f"loading (known: {listed(KINDS, 99)})"
        )
    if rho is None:
        return None
    settings = {key: value for key, value in told.items() if key != "kind"}
    try:
        KINDS[kind].check_settings(settings, rho.shape)
        prior = KINDS[kind].from_settings(settings)
    except Exception as error:  # of a prior of the user's own, any
        raise PriorError(f"the checkpoint's prior {kind!r} of {name}: {error}") from error
    prior._apply(lambda tensor: _moved(tensor, rho.device))
    return prior


def _estimator(name: str, told: Any) -> str:
    try:
        return check_estimator(told)
    except EstimatorError as error:
        raise EstimatorError(f"the checkpoint's estimator of {name}: {error}") from None


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor[(0,) * tensor.dim()].to(device).expand(tensor.shape) if is_room(tensor) else tensor.to(device)
