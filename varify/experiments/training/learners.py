"""A network with its optimizer: the plain one, and the variational one by the library's recipe."""

import copy
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import varify
from varify.experiments.settings import Settings
from varify.experiments.spelling import schedule
from varify.experiments.training.plans import Plan

Figures = dict[str, float]


class Learner:
    """One of the two.

    Attributes:
        network: that learns.
        plan: of its rates.
        seconds: that its steps took.
    """

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, settings: Settings) -> None:
        self.network, self._optimizer = network, optimizer
        self.plan = Plan(optimizer, settings)
        self.seconds = 0.0

    def losses(self, x: Tensor, y: Tensor) -> tuple[Tensor, Figures]:
        """What goes backward, and what is to be shown: nats per image, but the total `kl`."""
        loss = F.cross_entropy(self.network(x), y)
        return loss, {"plain": loss.item()}

    def step(self, x: Tensor, y: Tensor) -> Figures:
        """One step on a batch; returns what is to be shown."""
        start = time.perf_counter()
        loss, figures = self.losses(x, y)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self.seconds += time.perf_counter() - start
        return figures

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "plan": self.plan.state_dict(),
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a saved state."""
        self.network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.plan.load_state_dict(state["plan"])
        self.seconds = state["seconds"]


class PlainLearner(Learner):
    """The network as it is, by Adam."""

    def __init__(self, network: nn.Module, settings: Settings) -> None:
        super().__init__(network, torch.optim.Adam(network.parameters(), settings.lr), settings)


class VariationalLearner(Learner):
    """Its variational twin: `variationalize`, `ELBO` and `parameter_groups`, or IVON, with the library's defaults.

    Args:
        plain: the network; it is copied.
        settings: of the run.
        example: a batch of images, to learn how estimators serve.
        num_data: number of training images.
        num_batches: steps of an epoch.
    """

    def __init__(self, plain: nn.Module, settings: Settings, example: Tensor, num_data: int, num_batches: int) -> None:
        vnet = variational(plain, settings)
        _plan_calls(vnet, example)
        weight = varify.kl_weight(vnet, num_data) if settings.beta == "auto" else float(settings.beta)
        factor = schedule(settings.kl_schedule, settings.epochs * num_batches, num_batches)
        self.elbo = varify.ELBO(
            num_data=num_data, n_samples=settings.train_samples, beta=lambda step: weight * factor(step)
        )
        self._natural = settings.optimizer == "ivon"
        optimizer: torch.optim.Optimizer
        if self._natural:
            optimizer = varify.optim.IVON(
                vnet, settings.ivon_lr, num_data=num_data, beta=weight, hess_init=settings.hess_init
            )
        else:
            optimizer = torch.optim.Adam(varify.parameter_groups(vnet, settings.lr, settings.rho_lr))
        super().__init__(vnet, optimizer, settings)

    def losses(self, x: Tensor, y: Tensor) -> tuple[Tensor, Figures]:  # noqa: D102
        terms = self.elbo(self.network, F.cross_entropy, x, y)
        figures = {"loss": terms.loss.item(), "nll": terms.nll.item(), "kl": terms.kl.item()}
        return terms.nll if self._natural else terms.loss, figures

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return super().state_dict() | {"step": self.elbo.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: D102
        super().load_state_dict(state)
        self.elbo.step = state["step"]


def variational(plain: nn.Module, settings: Settings) -> varify.VariationalModule:
    """The variational network that the settings ask for; what they leave open is the library's default."""
    options: dict[str, Any] = {
        "prior": settings.make_prior(),
        "init": settings.init,
        "where": settings.where,
        "estimator": settings.estimator,
    }
    return varify.variationalize(plain, **{name: value for name, value in options.items() if value is not None})


def _plan_calls(vnet: varify.VariationalModule, example: Tensor) -> None:
    # A training call of a new kind has drawn weights, whatever the estimator. Made here, and undone, it is not one of
    # the training's: or a resumed run, whose network has no plans, would go on otherwise than one without interruption.
    before = copy.deepcopy(vnet.state_dict())
    devices = [example.device] if example.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        vnet.train()(example)
    vnet.load_state_dict(before)
