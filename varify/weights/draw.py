"""Draws of many parameters at once, and how they are made at the moment."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from varify.weights.fused import LARGE, is_ordinary, is_plain
from varify.weights.fused import certain as certain_draw
from varify.weights.fused import draws as fused_draws
from varify.weights.kl import Posterior
from varify.weights.noise import normals_like
from varify.weights.posterior import GaussianPosterior, cast


def draw(posteriors: Mapping[str, Posterior], noise: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """theta: one draw of every parameter by name, each in its network's dtype.

    Args:
        posteriors: by name.
        noise: eps to reuse by name; what is missing is drawn and put in.
    """
    theta: dict[str, Tensor] = {}
    plain, differentiable, small = is_plain(), torch.is_grad_enabled(), _Together()
    certain = {name: _certain(q, plain and differentiable) for name, q in posteriors.items() if _is_certain(q)}
    known = {} if noise is None else noise
    missing = posteriors
    if known or certain:
        missing = {name: q for name, q in posteriors.items() if name not in known and name not in certain}
    known.update(fresh_noise(missing))
    for name, q in posteriors.items():
        if name in certain:
            theta[name] = _asking_for_gradients(certain[name], q.mu)
            continue
        eps = known[name]
        theta[name] = eps  # in this order
        if not (plain and _is_fused(q, eps)):
            theta[name] = _asking_for_gradients(cast(q.at(eps), q.mu.dtype), q.mu)
            continue
        mu = _means(q)
        if q.fixed is not None:  # a weight without noise is at its mean, and its rho has no gradient
            eps = (eps.mul_ if noise is None else eps.mul)(1 - q.fixed.clamp_max(1))
        if not differentiable:
            into = eps if noise is None and q.mu.dtype == eps.dtype else None
            drawn = torch.addcmul(cast(mu, eps.dtype), q.known_sigma(), eps, out=into)
            theta[name] = _asking_for_gradients(cast(drawn, q.mu.dtype), q.mu)
        elif q.mu.numel() < LARGE:
            small.add(name, mu, q, eps)
        else:
            (theta[name],) = fused_draws([mu], [q.rho], [q.known_sigma()], [eps])
    theta.update(small.drawn())
    return theta


def fresh_noise(posteriors: Mapping[str, Posterior]) -> dict[str, Tensor]:
    """Eps of a draw of every parameter by name, filled together."""
    if any(type(q) is not GaussianPosterior for q in posteriors.values()):
        return {name: q.noise() for name, q in posteriors.items()}
    rhos = [q.rho for q in posteriors.values() if type(q) is GaussianPosterior]
    return dict(zip(posteriors, normals_like(rhos), strict=True))


def _is_certain(q: Posterior) -> TypeGuard[GaussianPosterior]:
    """Whether no weight of a Gaussian posterior is random."""
    return type(q) is GaussianPosterior and q.fixed is not None and not q.mask_has.random


def _means(q: GaussianPosterior) -> Tensor:
    """The mean in the network's dtype: mu itself where nothing is pruned."""
    return q.mu if q.fixed is None or not q.mask_has.pruned else cast(q.mean, q.mu.dtype)


def _certain(q: GaussianPosterior, differentiable: bool) -> Tensor:
    """The draw of a posterior of which no weight is random: a new tensor, which the network may write into."""
    means = _means(q)
    if differentiable and is_ordinary(q.mu, q.rho):
        return certain_draw(means, q.rho)
    return means.clone() if means is q.mu else means


def _is_fused(q: Posterior, eps: Tensor) -> TypeGuard[GaussianPosterior]:
    """Whether the draw is that of a Gaussian posterior of torch's own tensors."""
    if type(q) is not GaussianPosterior or eps.requires_grad or eps.dtype != q.rho.dtype:
        return False
    return is_ordinary(q.mu, q.rho, eps)


class _Together:
    """Draws of small tensors, to be made by one function."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._parts: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]] = ([], [], [], [])

    def add(self, name: str, mu: Tensor, q: GaussianPosterior, eps: Tensor) -> None:
        self._names.append(name)
        for part, tensor in zip(self._parts, (mu, q.rho, q.known_sigma(), eps), strict=True):
            part.append(tensor)

    def drawn(self) -> dict[str, Tensor]:
        return dict(zip(self._names, fused_draws(*self._parts), strict=True)) if self._names else {}


def _asking_for_gradients(drawn: Tensor, mu: Tensor) -> Tensor:
    """A draw that requires a gradient where gradients are off and the parameter does: a forward may ask."""
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._functorch.maybe_current_level() is not None
    ):
        return drawn  # which can't be done within transforms
    return drawn.requires_grad_(mu.requires_grad)


@dataclass(eq=False)
class _Fixed:
    """Noise that all draws use, and the seed of estimated divergences beside them."""

    noise: dict[str, Tensor]
    seed: int | None = None


class Drawing:
    """How one module draws at the moment: fresh noise while training, unless a context says otherwise.

    Attributes:
        kl_gradients: how many gradients went back through a divergence, for an optimizer that wants none, which sets
            it to 0. None: nobody counts.
        num_data: size of the training set, as the last objective had it, for an optimizer to compare; or None.
    """

    def __init__(self) -> None:
        self.kl_gradients: int | None = None
        self.num_data: int | None = None
        self._fixed: list[_Fixed] = []
        self._always: list[bool] = []

    def __reduce__(self) -> Any:
        return Drawing, ()  # a copy or a pickled module is in no context

    @property
    def noise(self) -> dict[str, Tensor] | None:
        """Eps by parameter name, which all draws use; what is missing is drawn and put in. None: fresh noise."""
        return self._fixed[-1].noise if self._fixed else None

    @property
    def always(self) -> bool:
        """Whether weights are drawn in eval mode as well."""
        return bool(self._always)

    def copy(self) -> "Drawing":
        """Another one that is so at first."""
        new = Drawing()
        new._fixed, new._always = list(self._fixed), list(self._always)
        return new

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Within, weights are drawn in eval mode as well."""
        self._always.append(True)  # and not a count: this is one step, whatever other threads do
        try:
            yield
        finally:
            self._always.pop()

    @contextmanager
    def fixed(self, noise: dict[str, Tensor]) -> Iterator[None]:
        """Within, all draws use this noise; it gets what is missing."""
        new = _Fixed(noise)
        self._fixed.append(new)
        try:
            yield
        finally:  # this one, whatever other threads have entered or left
            self._fixed[:] = [fixed for fixed in self._fixed if fixed is not new]

    def counted(self, kl: Tensor) -> Tensor:
        """A divergence, scalar `()`, whose gradients count if somebody asked for that."""
        if self.kl_gradients is not None and kl.requires_grad and not torch.compiler.is_compiling():
            kl.register_hook(self._count)
        return kl

    def _count(self, grad: Tensor) -> None:
        self.kl_gradients = (self.kl_gradients or 0) + 1

    def same_numbers(self, devices: list[int]) -> Any:
        """Within, random numbers are the same every time, if noise is fixed: of the CPU and these CUDA devices."""
        if not self._fixed or torch.compiler.is_compiling():
            return nullcontext()
        fixed = self._fixed[-1]
        fixed.seed = int(torch.randint(2**62, ())) if fixed.seed is None else fixed.seed
        return seeded(fixed.seed, devices)


@contextmanager
def seeded(seed: int, devices: list[int]) -> Iterator[None]:
    """Within, torch's random numbers are those of `seed`, on the CPU and these CUDA devices; afterwards, as before."""
    with torch.random.fork_rng(devices):
        # not torch.manual_seed, which seeds the generators of all devices, also of those that are not forked
        for generator in (torch.default_generator, *(torch.cuda.default_generators[i] for i in devices)):
            generator.manual_seed(seed)
        yield
