"""The contract of a prior."""

import copy
import io
import math
import pickle
import unittest
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from varify.module import VariationalModule
from varify.priors import Prior, PriorLike, as_prior
from varify.testing.checks import DRAWS, SmallNetwork, assert_same_mean, fixed_seed, or_else
from varify.variationalize import variationalize
from varify.weights.posterior import GaussianPosterior, softplus_inverse


class PriorContract:
    """What varify asks of a prior. Subclass it, and define `make`.

    Attributes:
        shape: of the parameter, where the prior's hyper-parameters need one of their own.
        proper: whether the density integrates to 1. Set it to False for a prior whose constant isn't known.
    """

    shape: tuple[int, ...] = (3, 4)
    proper: bool = True

    def make(self) -> PriorLike:
        """The prior, as it is given to `variationalize`."""
        raise NotImplementedError(f"{type(self).__name__} must define make(self): return the prior")

    def log_density(self, w: np.ndarray) -> Any:
        """Log p(w), `()` or elementwise `(*shape)`, by other means such as scipy; w is `(*shape)`, float64."""
        raise unittest.SkipTest("no reference: define log_density(self, w) to have log_prob compared with it")

    def _vnet(self) -> VariationalModule:
        return variationalize(SmallNetwork(self.shape), prior={"weight": self.make()}).double()

    def _prior(self) -> Prior:
        return self._vnet().posteriors["weight"].prior

    def _weights(self) -> Tensor:
        return torch.randn(self.shape, dtype=torch.float64)

    @fixed_seed()
    def test_log_prob_is_a_finite_scalar(self) -> None:
        """`log_prob(w)` is a finite scalar, in the precision of w at least, and leaves w alone."""
        prior, w = self._prior(), self._weights()
        found = []
        for dtype in (torch.float64, torch.float32):
            given = w.to(dtype, copy=True)
            log_p = prior.to(dtype).log_prob(given)
            shape = tuple(log_p.shape)
            assert not shape, f"log_prob(w) has shape {shape}: it is of the whole tensor, a scalar; add .sum()"
            assert torch.promote_types(log_p.dtype, dtype) == log_p.dtype, f"log_prob of {dtype} is {log_p.dtype}"
            assert log_p.isfinite(), f"log_prob(w) is {log_p}: a weight may be any real number"
            assert torch.equal(given, w.to(dtype)), "log_prob wrote into w: use operations that make new tensors"
            found.append(log_p.double())
        assert_close(*found, rtol=1e-3, atol=1e-3, msg=lambda m: f"{m}\nlog_prob(w) depends on the precision of w")

    @fixed_seed()
    def test_log_prob_is_differentiable(self) -> None:
        """Its gradient is finite, at 0 as well, and that of finite differences."""
        prior, w = self._prior(), self._weights()
        for at in (torch.zeros_like(w), w * (torch.rand_like(w) < 0.5), w):
            at.requires_grad_()
            log_p = prior.log_prob(at)
            assert log_p.requires_grad, "no gradient reaches w: log_prob must not detach it or leave torch"
            gradient = torch.autograd.grad(log_p, at)[0]
            assert gradient.isfinite().all(), f"the gradient of log_prob is {gradient} at {at}: mind 0, abs and sqrt"
        right = torch.autograd.gradcheck(prior.log_prob, (at,), raise_exception=False)
        assert right, "the gradient of log_prob is not that of finite differences: does it detach, or round to float32?"

    @fixed_seed()
    def test_log_prob_does_not_depend_on_layout(self) -> None:
        """A tensor with other strides has the same density."""
        prior, w = self._prior(), self._weights()
        backwards = range(w.dim())[::-1]
        strided = w.permute(*backwards).contiguous().permute(*backwards)
        assert_close(prior.log_prob(strided), prior.log_prob(w), msg=lambda m: f"{m}\nuse .flatten(), not storage")

    @fixed_seed()
    def test_log_prob_is_the_reference(self) -> None:
        """Where `log_density` is defined, `log_prob` equals it, near 0 and far out."""
        prior = self._prior()
        for scale in (0.01, 1.0, 10.0):
            w = scale * self._weights()
            expected = torch.tensor(float(np.sum(self.log_density(w.numpy()))), dtype=torch.float64)
            text = f"\nlog_prob(w) is not the reference's at weights of scale {scale}"
            assert_close(prior.log_prob(w), expected, rtol=1e-5, atol=1e-5, msg=lambda m: m + text)  # noqa: B023

    @fixed_seed()
    def test_the_density_of_one_weight_is_normalized(self) -> None:
        """It integrates to 1, so it is in nats with its constant; `stddev` is the density's, if there is one."""
        if not self.proper:
            raise unittest.SkipTest("proper = False")
        one = torch.zeros(self.shape, dtype=torch.bool)
        one[(0,) * one.dim()] = True
        prior = self._prior()
        w, density = _density(prior.at(one).log_prob)
        total = torch.trapezoid(density, w).item()
        assert abs(total - 1) < 0.01, (
            f"the density of one weight integrates to {total:.4g}, not 1: log_prob must be in nats, with its constant; "
            "set proper = False if it has none"
        )
        std = prior.stddev()
        if std is not None:
            mean = torch.trapezoid(w * density, w)
            expected = math.sqrt(torch.trapezoid((w - mean) ** 2 * density, w))
            given = float(torch.as_tensor(std).expand(self.shape)[one])
            assert abs(given / expected - 1) < 0.02, (
                f"stddev is {given:.4g}, but the density's standard deviation is {expected:.4g}: is it a variance?"
            )

    @fixed_seed()
    def test_weight_std_is_positive_or_none(self) -> None:
        """`stddev()` is None, or positive and finite and broadcasts to the parameter."""
        std = as_prior(self.make()).for_parameter(self._weights().float(), 4).stddev()
        if std is None:
            return
        std = torch.as_tensor(std)
        with or_else("stddev must broadcast to the parameter"):
            std.expand(self.shape)
        assert ((std > 0) & std.isfinite()).all(), f"stddev is {std}: return None if there is none"

    @fixed_seed()
    def test_each_parameter_has_a_copy(self) -> None:
        """`for_parameter` gives a copy, whose tensors are buffers: they move and are saved."""
        original, w = as_prior(self.make()), self._weights().float()
        one, other = (original.for_parameter(w, 4) for _ in range(2))
        way_out = "end for_parameter with super().for_parameter(w, fan_in), which copies"
        assert len({id(original), id(one), id(other)}) == 3, f"for_parameter gives the same object again: {way_out}"
        storages = [b.untyped_storage().data_ptr() for p in (original, one, other) for b in p.buffers()]
        assert len(set(storages)) == len(storages), f"copies share a tensor: {way_out}"
        loose = [name for name, value in vars(one).items() if isinstance(value, Tensor)]
        assert not loose, f"{loose} would not move or be saved: make buffers of tensors, with self.keep(name=value)"
        learned = [name for name, _ in one.named_parameters()]
        assert not learned, f"{learned} are parameters, but hyper-parameters are constants: use self.keep(name=value)"
        log_p = one.double().log_prob(w.double())
        assert log_p.dtype == torch.float64, f"after .double(), log_prob is {log_p.dtype}"

    @fixed_seed()
    def test_it_is_saved_and_loaded(self) -> None:
        """A state dict brings the prior to a network that was converted with another one."""
        vnet, other, w = self._vnet(), variationalize(SmallNetwork(self.shape)).double(), self._weights()
        prior = vnet.posteriors["weight"].prior
        with or_else("To be saved, a prior keeps each argument under its name: self.keep(scale=scale) in __init__"):
            file = io.BytesIO()
            torch.save(vnet.state_dict(), file)
            other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
            again = type(prior).from_settings(prior.settings())
            again.double().load_state_dict(prior.state_dict())
            _assert_alike(prior, other.posteriors["weight"].prior, w, "loaded")
            _assert_alike(prior, again, w, "made of its settings")

    @fixed_seed()
    def test_it_is_copied_and_pickled(self) -> None:
        """So that networks are."""
        vnet, w = self._vnet(), self._weights()
        prior = vnet.posteriors["weight"].prior
        with or_else("Define the prior's class at the top of a module, and keep numbers and tensors alone"):
            for made, how in ((copy.deepcopy(vnet), "copied"), (pickle.loads(pickle.dumps(vnet)), "pickled")):
                _assert_alike(prior, made.posteriors["weight"].prior, w, how)

    @fixed_seed()
    def test_it_is_a_prior_of_some_weights(self) -> None:
        """`at(mask)` is that of the chosen weights, which pruning needs."""
        prior, w = self._prior(), self._weights()
        whole, everything = prior.log_prob(w), torch.ones(self.shape, dtype=torch.bool)
        text = "\nat(chosen) must pick the hyper-parameters of the chosen weights"
        assert_close(prior.at(everything).log_prob(w[everything]), whole, msg=lambda m: m + text)
        chosen = torch.rand(self.shape) < 0.5
        parts = [prior.at(mask).log_prob(w[mask]) for mask in (chosen, ~chosen)]
        assert all(not p.shape and p.isfinite() for p in parts), f"log_prob of some weights is {parts}"
        if _is_additive(prior.log_prob, w):
            assert_close(parts[0] + parts[1], whole, msg=lambda m: m + text)
        kl = GaussianPosterior(w, w - 1, prior, chosen.to(torch.int8)).kl_divergence()
        assert kl.isfinite(), f"the KL of weights some of which are fixed is {kl}"

    @fixed_seed()
    def test_a_network_takes_it(self) -> None:
        """`set_prior(where=...)` sets it there alone; KL and gradients are finite, of half-precision networks too."""
        for dtype in (torch.float32, torch.bfloat16):
            vnet = variationalize(SmallNetwork(self.shape).to(dtype))
            before = repr(vnet.posteriors["other"].prior)
            vnet.set_prior(self.make(), where="weight")
            assert type(vnet.posteriors["weight"].prior) is type(as_prior(self.make()))
            assert repr(vnet.posteriors["other"].prior) == before
            vnet.prior_loss().backward()
            gradients = [p.grad for p in vnet.parameters()]
            assert all(g is not None and g.isfinite().all() for g in gradients), f"gradients of the KL: {gradients}"

    @fixed_seed()
    def test_kl_divergence_is_that_of_draws(self) -> None:
        """An exact rule, or the mean of estimates, is the mean of log q(w) - log p(w) over draws."""
        q = self._posterior()
        with torch.no_grad():
            log_q = torch.distributions.Normal(q.mu, F.softplus(q.rho)).log_prob
            draws = [q.rsample() for _ in range(DRAWS)]
            reference = torch.stack([log_q(w).sum() - q.prior.log_prob(w) for w in draws])
            found = torch.stack([q.kl_divergence() for _ in range(DRAWS // 10)])
        assert found.dim() == 1, f"the KL has shape {tuple(found.shape[1:])}: add .sum()"
        text = f"the KL is {found.mean():.4g}, but {reference.mean():.4g} over draws: mind register_kl's rule, and nats"
        assert_same_mean(found, reference, text)

    @fixed_seed()
    def test_gradients_of_the_kl_are_right(self) -> None:
        """In mu and rho, they are those of finite differences with the same draws."""
        q = self._posterior()

        @fixed_seed()
        def kl(mu: Tensor, rho: Tensor) -> Tensor:
            return GaussianPosterior(mu, rho, q.prior).kl_divergence()

        right = torch.autograd.gradcheck(kl, (q.mu, q.rho), raise_exception=False)
        assert right, "the KL's gradient is not that of finite differences: does its rule detach, or round to float32?"

    def _posterior(self) -> GaussianPosterior:
        prior = self._prior()
        std = prior.stddev()
        scale = torch.as_tensor(1.0 if std is None else std).expand(self.shape)
        mu, rho = scale * self._weights(), softplus_inverse(scale * (0.3 + torch.rand(self.shape).double()))
        return GaussianPosterior(mu.requires_grad_(), rho.requires_grad_(), prior)


def _assert_alike(prior: Prior, other: Prior, w: Tensor, how: str) -> None:
    same = type(prior) is type(other) and repr(prior) == repr(other)
    assert same, f"{prior} is {other} when it is {how}: settings() must give what __init__ was given"
    log_p, other_log_p = prior.log_prob(w), other.log_prob(w)
    assert_close(other_log_p, log_p, msg=lambda m: f"{m}\nlog_prob differs when the prior is {how}: use self.keep")


def _is_additive(log_prob: Callable[[Tensor], Tensor], w: Tensor) -> bool:
    one, other = torch.zeros_like(w), torch.zeros_like(w)
    one.view(-1)[0], other.view(-1)[-1] = 1.0, 1.0
    mixed = log_prob(w + one + other) - log_prob(w + one) - log_prob(w + other) + log_prob(w)
    return bool(mixed.abs() < 1e-9 * (1 + log_prob(w).abs()))


def _density(log_prob: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Weights from -1e40 to 1e40, for heavy tails, and the density at each: fine near 0 and near its maxima."""
    spread = 1e-3 * torch.sinh(torch.linspace(-100, 100, 2001, dtype=torch.float64))
    peaks = torch.zeros(1, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(2):
            w = (peaks + spread.unsqueeze(1)).flatten().unique()
            log_p = torch.stack([log_prob(x) for x in w.unsqueeze(1)])
            inner = log_p[1:-1]
            top = (inner > log_p[:-2]) & (inner >= log_p[2:]) & (inner > log_p.max() - 50)
            peaks = w[1:-1][top].mul(100).round().div(100).unique()  # closer ones share their points
    return w, log_p.exp().nan_to_num()  # formulas may overflow far out, where there is no mass
