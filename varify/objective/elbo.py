"""The objective: negative log likelihood and KL, weighted as they must be."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from varify.errors import ArgumentError, VarifyWarning, one_of, positive_int
from varify.module import VariationalModule
from varify.network.arguments import fewest, unpack
from varify.network.signature import copied
from varify.objective.schedules import Schedule
from varify.weights.draw import fresh_noise
from varify.within import learns_undrawn, pairs_draws, prior_loss, required_parts, sharing_sigma, variational_parts

BOUNDS = ("elbo", "importance_weighted")
Criterion = Callable[[Any, Any], Tensor]
KL_FACTOR = 0.03  # the weight of the KL with one datum for each variational weight


class Terms(NamedTuple):
    """What `ELBO` returns; each a scalar `()`, differentiable.

    Attributes:
        loss: what to minimize, nats per datum.
        nll: negative log likelihood, mean per datum, nats.
        kl: total KL(q‖p), nats, as it is: neither weighted nor divided.
    """

    loss: Tensor
    nll: Tensor
    kl: Tensor


class ELBO:
    r"""The negative evidence lower bound per datum: loss = nll + beta·kl/num_data.

    Args:
        num_data: size of the training set, not of a batch: the KL belongs to all the data together.
        n_samples: forwards a step, each with its own draw; the nll is their mean. Where `vnet` is a variational module
            that draws all its weights (estimator "weights"), the draws are pairs of eps and -eps: each is one of the
            posterior, so the mean is unbiased, and what is odd in eps, most of the noise where sigma is small, is out
            of it. Other estimators, variational parts within a plain network and DDP have independent draws.
        beta: weight of the KL: "auto", see `kl_weight` (of the importance-weighted bound, 1); a number, 1 for the
            evidence lower bound itself; or a function of the step such as those in `varify.schedules`. The terms are
            reported as they are, whatever the weight.
        bound: "elbo", or "importance_weighted", the bound of Burda, Grosse & Salakhutdinov (2016, arXiv:1509.00519)
            over the weights, $-\log \frac1S \sum_s e^{-N nll_s} (p(w_s)/q(w_s))^\beta$ divided by N = num_data. It is
            tighter than the ELBO with more samples, needs drawn weights (estimator "weights"), and is a bound when
            the batch is all of the data; on minibatches, N times a batch's nll stands for the data's.

    Attributes:
        step: training steps counted so far, for a schedule; set it after a resumed training.

    Raises:
        ArgumentError: num_data < 1, n_samples < 1, a negative beta or an unknown bound.
    """

    def __init__(
        self, *, num_data: int, n_samples: int = 1, beta: float | Schedule | str = "auto", bound: str = "elbo"
    ) -> None:
        is_number = isinstance(beta, (Real, Tensor)) and 0 <= float(beta) < math.inf
        if not (callable(beta) or is_number or beta == "auto"):
            raise ArgumentError(
                "beta must be 'auto', a number of at least 0, or a function of the step such as "
                f"varify.schedules.warm_up(1000), got {beta!r}"
            )
        one_of("bound", bound, BOUNDS)
        self.num_data, self.n_samples = positive_int("num_data", num_data), positive_int("n_samples", n_samples)
        self.bound = bound
        self.step = 0
        self._beta = beta
        self._warned = False
        self._found: float | None = None

    def __repr__(self) -> str:
        beta = repr(self._beta)
        if isinstance(self._beta, str):  # with the reason in short
            beta += f" (by data for each variational weight, see kl_weight: {self._found or 'known at the first call'})"
        return f"ELBO(num_data={self.num_data}, n_samples={self.n_samples}, beta={beta}, bound={self.bound!r})"

    @property
    def beta(self) -> float | None:
        """Weight of the KL at this step; with "auto" that of the last call, None before it."""
        if callable(self._beta):
            return float(self._beta(self.step))
        return self._found if isinstance(self._beta, str) else float(self._beta)

    def weight(self, network: nn.Module) -> float:
        """Weight of the KL of this network at this step."""
        if isinstance(self._beta, str):  # the importance-weighted bound is one with the whole KL alone
            self._found = kl_weight(network, self.num_data) if self.bound == "elbo" else 1.0
        beta = self.beta
        assert beta is not None
        return beta

    def __call__(self, vnet: nn.Module, criterion: Criterion, inputs: object, targets: object) -> Terms:
        """The terms on one batch. A call in training mode counts as a step.

        Once, a `VarifyWarning` tells of weights that are trained at their means: in eval mode with gradients on,
        outside `vnet.sampling()`.

        Args:
            vnet: a variational module, or any module with variational parts, also within DDP.
            criterion: `(output, targets)` to a mean over the batch, as torch's losses are by default.
            inputs: one tensor, a tuple of positional or a dict of keyword arguments; a list is taken for a tuple, as
                `DataLoader` makes them, by a network that needs more than one argument.
            targets: handed to the criterion.

        Raises:
            ModelError: nothing in `vnet` is variational.
            ArgumentError: the criterion is no function or returns no scalar, the batch is larger than num_data, or the
                inputs are a list that may be one argument or several.
        """
        parts = required_parts(vnet)
        check_criterion(criterion)
        args, kwargs = unpack(inputs, vnet)
        batch = fewest(args, kwargs, targets)
        if batch is not None and batch > self.num_data:
            raise ArgumentError(
                f"num_data={self.num_data}, but this batch alone has {batch}: num_data is the size of the training set"
            )
        self._warn_of_eval_mode(vnet)
        for part in parts if not torch.compiler.is_compiling() else []:
            part.drawing.num_data = self.num_data
        beta = self.weight(vnet)
        if self.bound == "elbo":
            with sharing_sigma(vnet):
                # First, so that backward comes to it last, when the draws and their noise are freed already.
                kl = prior_loss(vnet)
                nlls = [loss_of(criterion, output, targets) for output in self._outputs(vnet, args, kwargs)]
            nll = torch.stack(nlls).mean()
            terms = Terms(nll + beta * kl / self.num_data, nll, kl)
        else:
            terms = self._importance_weighted(vnet, criterion, args, kwargs, targets, beta)
        self.step += vnet.training
        return terms

    def _outputs(self, vnet: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Any]:
        """The outputs of `n_samples` forwards, one after another, in pairs of opposite noise."""
        if self.n_samples == 1:
            yield vnet(*args, **kwargs)
            return

        def output() -> Any:
            own, named = copied(args, kwargs)
            return vnet(*own, **named)

        paired = self.n_samples // 2 if pairs_draws(vnet) else 0
        for _ in range(paired):
            noise: dict[str, Tensor] = {}
            with vnet.drawing.fixed(noise):  # type: ignore[union-attr, operator]
                first = output()
            yield first
            with vnet.drawing.fixed({name: -eps for name, eps in noise.items()}):  # type: ignore[union-attr, operator]
                second = output()
            yield second
        for _ in range(self.n_samples - 2 * paired):
            yield output()

    def _warn_of_eval_mode(self, vnet: nn.Module) -> None:
        # the other bound draws in eval mode as well; a compiled function has no place for warnings
        if self._warned or self.bound != "elbo" or torch.compiler.is_compiling() or not learns_undrawn(vnet):
            return
        self._warned = True
        warnings.warn(
            f"the {type(vnet).__name__} is in eval mode and gradients are on: its weights are not drawn, and elbo.step "
            f"stays at {self.step}. Call vnet.train() before training; to validate, use torch.no_grad() or "
            "vnet.sampling()",
            VarifyWarning,
            stacklevel=3,
        )

    def _importance_weighted(
        self,
        vnet: nn.Module,
        criterion: Criterion,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        targets: object,
        beta: float,
    ) -> Terms:
        if not isinstance(vnet, VariationalModule):
            raise ArgumentError(f"bound='importance_weighted' needs a VariationalModule, not {type(vnet).__name__}")
        parts, nlls, log_ratios = variational_parts(vnet), [], []
        for _ in range(self.n_samples):
            drawn = [(part, fresh_noise(part.posteriors)) for part in parts]
            with ExitStack() as stack:
                stack.enter_context(vnet.sampling())
                for part, noise in drawn:
                    stack.enter_context(part.drawing.fixed(noise))
                own, named = copied(args, kwargs)
                nlls.append(loss_of(criterion, vnet(*own, **named), targets))
            ratios = [q.log_ratio(noise[name]) for part, noise in drawn for name, q in part.posteriors.items()]
            log_ratios.append(torch.stack([ratio.to(ratios[0].device) for ratio in ratios]).sum())
        nll, log_ratio = torch.stack(nlls), torch.stack(log_ratios)
        bound = torch.logsumexp(-self.num_data * nll - beta * log_ratio, 0) - math.log(self.n_samples)
        return Terms(-bound / self.num_data, nll.mean(), log_ratio.mean())


def kl_weight(network: nn.Module, num_data: int) -> float:
    r"""The weight of the KL that `ELBO(beta="auto")` takes: 0.03·max(r, √r), at most 1, of r data for each weight.

    r is num_data / number of variational weights. With 33 data for each weight the loss is the evidence lower bound. A
    network with fewer tends to end near its prior under the whole of it, the more so the wider it is: the KL of a
    mean-field posterior grows with every weight, and what the data say does not (Coker et al. 2022, arXiv:2106.07052).
    There the KL counts less, which is a colder posterior and no bound: in proportion to r, and with less than one datum
    for each weight to its root, since of such a network many weights are not determined by the data, whose spread costs
    little. Weights with a mask (padding, pruned) count as well. Form and factor were found by measurement:
    `tests/benchmarks/defaults.py`.

    Args:
        network: a variational module, or any module with variational parts.
        num_data: size of the training set.

    Raises:
        ModelError: nothing in `network` is variational.
    """
    weights: int = sum(rho.numel() for part in required_parts(network) for rho in part.rho.parameters())
    r = positive_int("num_data", num_data) / max(weights, 1)
    return min(1.0, KL_FACTOR * max(r, math.sqrt(r)))


def check_criterion(criterion: object) -> None:
    """Check what is to be called with an output and targets.

    Raises:
        ArgumentError: it is a class, or can't be called.
    """
    if isinstance(criterion, type):
        name = criterion.__name__
        raise ArgumentError(f"the criterion {name} is a class: pass an instance, {name}()")
    if not callable(criterion):
        what = repr(criterion) if isinstance(criterion, (str, int, float)) else f"a {type(criterion).__name__}"
        raise ArgumentError(
            f"the criterion must be a function of (output, targets), such as F.cross_entropy, got {what}; "
            "see the order of the arguments"
        )


def loss_of(criterion: Criterion, output: object, targets: object) -> Tensor:
    """The criterion's value, checked.

    Raises:
        ArgumentError: it is no scalar tensor, or a TypeError because the output is a structure with logits.
    """
    try:
        loss = criterion(output, targets)
    except TypeError as error:
        if isinstance(output, Tensor) or not hasattr(output, "logits"):
            raise
        raise ArgumentError(
            f"the criterion raised {type(error).__name__}, and the network returns a {type(output).__name__}: "
            "criterion=lambda output, y: F.cross_entropy(output.logits, y) takes the logits out of it"
        ) from error
    return scalar(loss)


def scalar(loss: object) -> Tensor:
    """The criterion's value, checked.

    Raises:
        ArgumentError: it is no scalar tensor.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ArgumentError(f"the criterion must return a scalar, the mean over the batch, got {what}")
    return loss.reshape(())


def parameter_groups(network: nn.Module, lr: float, rho_lr: float | None = None) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: rho's, and stds of priors that learn, apart from everything else.

    These are scales, which want a rate of their own.

    Args:
        network: a variational module, or any module with variational parts.
        lr: of the means and the deterministic parameters.
        rho_lr: of the rho's and learned stds; default 5·lr: sigma changes by a factor with each unit of rho, and at
            the rate of the means it would not come far in a usual training. Weight decay is 0 for both: the prior is
            the regularizer.
    """
    parts = [part for part in network.modules() if isinstance(part, VariationalModule)]
    rhos = {id(p) for part in parts for tree in (part.rho, part.prior) for p in tree.parameters()}
    parameters = [p for p in network.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) not in rhos], "lr": lr, "weight_decay": 0.0},
        {
            "params": [p for p in parameters if id(p) in rhos],
            "lr": 5 * lr if rho_lr is None else rho_lr,
            "weight_decay": 0.0,
        },
    ]
