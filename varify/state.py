"""What a variational module's state dict says beside the numbers: priors, estimators and masks, as one tensor.

All of it is checked before anything is made of it: anybody may have written a checkpoint.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from varify.errors import EstimatorError, PriorError, StructureError, listed
from varify.estimators.rules import check_estimator
from varify.network.loading import tied, try_loading
from varify.network.sharding import is_sharded
from varify.posteriors import Posteriors
from varify.priors.registry import kind_of, known_kinds, of_kind
from varify.weights.posterior import PRUNED
from varify.weights.prior import Prior, is_room


def extra_state(posteriors: Posteriors) -> Tensor:
    """Priors with their hyper-parameters, estimators and which parameters have masks: JSON as bytes, `(length,)`.

    A tensor, since tools of the ecosystem take state dicts of tensors alone.

    Raises:
        PriorError: a prior has settings that JSON can't hold.
    """
    trees, priors = posteriors.trees, {}
    for name in posteriors:
        prior = trees.prior.leaf_at(name)
        priors[name] = {"kind": kind_of(type(prior)), **prior.settings()}
        if not is_plain(priors[name]):
            raise PriorError(
                f"the prior of {name}, {prior!r}, has settings {prior.settings()}, which can't be saved: "
                "numbers, strings, and lists and dicts of them can"
            )
    fixed = [name for name in posteriors if trees.fixed.leaf_at(name) is not None]
    state = {"priors": priors, "estimators": posteriors.settings.estimators, "fixed": fixed}
    return torch.tensor(bytearray(json.dumps(state).encode()), dtype=torch.uint8)


def read_extra_state(state: object) -> Any:
    """What `extra_state` wrote, as a dict; a dict itself, as older checkpoints have.

    Raises:
        StructureError: it can't be read.
    """
    if not isinstance(state, Tensor):
        return state
    try:
        return json.loads(bytes(state.cpu().to(torch.uint8).tolist()))
    except (RuntimeError, TypeError, ValueError, RecursionError) as error:
        raise StructureError(
            f"the checkpoint's extra state can't be read ({type(error).__name__}: {error}); an average of state dicts "
            "must leave integers alone: take it from one of them"
        ) from None


def restore(posteriors: Posteriors, state: object) -> None:
    """Take the priors, estimators and masks of a checkpoint, all or none.

    Args:
        posteriors: names that are not among them are left to torch's report of keys.
        state: of `extra_state`.

    Raises:
        StructureError: it is no such state.
        PriorError: a prior is unknown, or has settings that can't be, or a shape that doesn't fit its parameter's.
        EstimatorError: an estimator is unknown.
    """
    rhos = {name: posteriors.trees.rho.leaf_at(name) for name in posteriors}
    found = _checked(read_extra_state(state), rhos)
    for name, prior in found.priors.items():
        prior.adopt(posteriors.trees.prior.leaf_at(name))
    posteriors.put_priors(found.priors)
    posteriors.settings.estimators.update(found.estimators)
    posteriors.clear_masks()
    for name in found.fixed:  # zeros as yet, since the masks' values come by keys of their own
        posteriors.set_mask(name, torch.zeros(rhos[name].shape, dtype=torch.int8))


@contextmanager
def loading(
    vnet: nn.Module, network: nn.Module, state_dict: Mapping[str, Any], strict: bool, assign: bool
) -> Iterator[None]:
    """Within, torch may load a state dict: it is known to fit, and tied parameters are tied again afterwards.

    Args:
        vnet: that loads.
        network: the plain one in it.
        state_dict: as for torch, as are `strict` and `assign`.
        strict: likewise.
        assign: likewise.
    """
    if is_sharded(vnet):  # it can't be copied, and torch has matched the state to its parts
        yield
        return
    try_loading(vnet, network, state_dict, strict)
    with tied(network, assign):
        yield


def zero_pruned(state_dict: dict[str, Any], prefix: str, posteriors: Posteriors) -> None:
    """Make pruned weights 0 in a state dict, wherever an optimizer's momentum has moved the parameters."""
    for name, q in posteriors.masked().items():
        key = f"{prefix}module.{name}"
        if isinstance(state_dict[key], nn.Parameter):  # by keep_vars=True, which asks for the parameters themselves
            continue
        state_dict[key] = state_dict[key].masked_fill(torch.as_tensor(q.fixed == PRUNED), 0.0)


def is_plain(value: object) -> bool:
    """Whether JSON gives the value back as it is, with the same types throughout."""
    try:
        return _alike(json.loads(json.dumps(value)), value)
    except (TypeError, ValueError):
        return False


def _alike(found: Any, value: Any) -> bool:
    if type(found) is not type(value):
        return False
    if isinstance(value, dict):
        return list(found) == list(value) and all(_alike(found[key], value[key]) for key in value)
    if isinstance(value, list):
        return len(found) == len(value) and all(map(_alike, found, value))
    return bool(found == value) or (isinstance(value, float) and found != found and value != value)


class _Restored(NamedTuple):
    """Of the parameters that are here, by name; tensors of the priors have no values yet."""

    priors: dict[str, Prior]
    estimators: dict[str, str]
    fixed: list[str]


def _checked(state: Any, rhos: Mapping[str, Tensor]) -> _Restored:
    for part, kind in (("priors", dict), ("estimators", dict), ("fixed", list)):
        if not isinstance(state, Mapping) or not isinstance(state.get(part), kind):
            raise StructureError(f"the checkpoint's extra state has no {kind.__name__} of {part}; varify wrote no such")
    priors = {name: _prior(name, settings, rhos.get(name)) for name, settings in state["priors"].items()}
    estimators = {name: _estimator(name, value) for name, value in state["estimators"].items() if name in rhos}
    fixed = [name for name in rhos if name in state["fixed"]]
    return _Restored({name: prior for name, prior in priors.items() if prior is not None}, estimators, fixed)


def _prior(name: str, written: Any, rho: Tensor | None) -> Prior | None:
    """The prior of a parameter; None without a parameter."""
    kind = written.get("kind") if isinstance(written, Mapping) else None
    if not isinstance(kind, str):
        raise PriorError(f"the checkpoint's prior of {name} is {str(written)[:99]}, not settings with a kind")
    known = of_kind(kind)
    if known is None:
        raise PriorError(
            f"the checkpoint has a prior of kind {kind!r} for {name}; import the module that defines it before "
            f"loading (known: {listed(known_kinds(), 99)})"
        )
    if rho is None:
        return None
    settings = {key: value for key, value in written.items() if key != "kind"}
    try:
        known.check_settings(settings, rho.shape)
        prior = known.from_settings(settings)
    except Exception as error:  # of a custom prior, any
        raise PriorError(f"the checkpoint's prior {kind!r} of {name}: {error}") from error
    prior._apply(lambda tensor: _moved(tensor, rho.device))
    return prior


def _estimator(name: str, written: object) -> str:
    try:
        return check_estimator(written)
    except EstimatorError as error:
        raise EstimatorError(f"the checkpoint's estimator of {name}: {error}") from None


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor[(0,) * tensor.dim()].to(device).expand(tensor.shape) if is_room(tensor) else tensor.to(device)
