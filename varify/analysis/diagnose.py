"""`diagnose`: what is wrong with a variational network and the way it is trained, in words."""

import copy
import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

from torch import Tensor, nn

from varify.analysis import symptoms, symptoms_in_a_batch  # noqa: F401  # which are added to the checks
from varify.analysis.checks import CHECKS
from varify.analysis.evidence import Evidence, first_batch, posteriors_of, random_numbers_kept
from varify.analysis.findings import Diagnosis, Finding
from varify.errors import ArgumentError, ModelError, positive_int
from varify.module import VariationalModule
from varify.network.sharding import refuse_sharded
from varify.objective.elbo import Criterion, check_criterion, kl_weight
from varify.within import variational_parts

NEEDS = {"batch": "a loader or batch"}  # as a user calls it


def diagnose(
    vnet: nn.Module,
    loader: Iterable[Any] | None = None,
    criterion: Criterion | None = None,
    *,
    batch: tuple[Any, Any] | None = None,
    num_data: int | None = None,
    beta: float | str | None = "auto",
    n_draws: int = 16,
) -> Diagnosis:
    """What is wrong with a network during or after training, and what to change. What isn't given isn't checked.

    It runs on copies of the network: its weights, modes, buffers and gradients stay, and so do torch's random numbers
    (those of numpy, or that a data set draws elsewhere, don't; an iterator has one batch less).

    Args:
        vnet: a variational module, or any module with variational parts, in the modes that it is trained in.
        loader: of (inputs, targets), inputs as for `ELBO`. Its first batch is taken.
        criterion: that the network is trained with, `(output, targets)` to a mean over the batch.
        batch: (inputs, targets), instead of a loader.
        num_data: that the KL is divided by, as in `ELBO`.
        beta: weight of the KL: a number, such as `elbo.beta`, or "auto" as in `ELBO`.
        n_draws: forwards and backwards on the batch, each with its own draw of the weights; at least 2.

    Raises:
        ModelError: nothing in `vnet` is variational.
        ArgumentError: an empty loader, a batch that is no pair, both, a criterion without a scalar, or a number that an
            argument can't have.
        StructureError: the parameters are in parts (FSDP2).
    """
    network = _checked_network(vnet)
    if positive_int("n_draws", n_draws) < 2:
        raise ArgumentError(f"n_draws must be at least 2, for a variance, got {n_draws}")
    num_data = None if num_data is None else positive_int("num_data", num_data)
    if beta is None or beta == "auto":  # None: of an ELBO that was not called yet
        beta = 1.0 if num_data is None else kl_weight(network, num_data)
    if isinstance(beta, bool) or not isinstance(beta, (Real, Tensor)) or not 0 <= float(beta) < math.inf:
        raise ArgumentError(f"beta must be 'auto' or a number of at least 0, such as elbo.beta, got {beta!r}")
    if criterion is not None:
        check_criterion(criterion)
    with random_numbers_kept(network, loader):
        given = first_batch(network, loader, batch)
        criterion = copy.deepcopy(criterion) if isinstance(criterion, nn.Module) else criterion
        evidence = Evidence(network, posteriors_of(network), given, criterion, num_data, float(beta), n_draws)
        findings, unchecked = _checked(evidence)
    named = network.module if isinstance(network, VariationalModule) else network
    return Diagnosis.of(type(named).__name__, findings, unchecked)


def _checked(evidence: Evidence) -> tuple[list[Finding], dict[str, str]]:
    """What the checks found, and why some were not made."""
    findings, unchecked = [], {}
    for name, needs, of, change in CHECKS:
        missing = [NEEDS.get(need, need) for need in needs if getattr(evidence, need) is None]
        found = f"needs {' and '.join(missing)}" if missing else of(evidence)
        if isinstance(found, str):
            unchecked[name] = found
        else:
            findings.append(Finding(name, *found, change="" if found.severity == "fine" else change))
    return findings, unchecked


def _checked_network(vnet: Any) -> nn.Module:
    if not isinstance(vnet, nn.Module):
        raise ModelError(f"vnet must be a network with variational parts, got {type(vnet).__name__}")
    if isinstance(vnet, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        vnet = vnet.module
    vnet = getattr(vnet, "_orig_mod", vnet)  # of torch.compile
    if not variational_parts(vnet):
        raise ModelError(
            f"vnet must be a network with variational parts, got a {type(vnet).__name__} without: "
            "vnet = varify.variationalize(network) makes one"
        )
    refuse_sharded(vnet, "diagnose()")
    network: nn.Module = vnet
    return network
