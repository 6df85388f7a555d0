"""What a variational module predicts: its face for all that is in `prediction/`."""

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from varify.errors import ArgumentError, ModelError, nonnegative_int, one_of, positive_int
from varify.network.parameters import Variational
from varify.network.sharding import gathered, refuse_sharded
from varify.posteriors import cuda_devices
from varify.prediction.ensemble import MEMORY, Ensemble
from varify.prediction.gather import gather
from varify.prediction.many import Draws
from varify.weights.draw import seeded
from varify.within import check_variational, means_of, refuse_nested, sampling, sharing_sigma


class Predicting(Variational):
    """The part of `VariationalModule` that predicts."""

    def predict(
        self,
        *args: object,
        n_samples: int = 32,
        seed: int | None = None,
        joint: bool = True,
        outputs: str = "logits",
        class_dim: int = -1,
        vectorize: bool | None = None,
        linearized: bool = False,
        gradients: bool = False,
        **kwargs: object,
    ) -> Any:
        """Outputs of `n_samples` draws of the weights, with the network in eval mode meanwhile.

        Args:
            args: of the network, as are `kwargs`.
            n_samples: number of draws.
            seed: of the draws, which are those after `torch.manual_seed(seed)`; torch's generators stay as they are.
                The same seed gives any batch the same weights.
            joint: whether a draw is one network for all inputs. If not, each input draws for itself: every input's
                samples have the same distribution, while those of two inputs are independent, so that quantiles of a
                sum over the batch, or a function of several inputs, mean nothing (nothing can check that). Then no
                weights are drawn where each input uses a weight once (local reparameterization, which is exact there),
                and what depends on no draw is computed once: much faster for an MLP or a Bayesian head. Elsewhere, and
                in `fixed_draw` or linearized, the draws are joint ones. For a single input both ways are the same, so
                it is predicted without drawing weights by default, unless there is a seed or a choice of `vectorize`.
            outputs: what the network returns, for the measures on classes; see `Prediction`.
            class_dim: the classes' dimension in one output.
            vectorize: whether to run several draws at once, by `torch.func.vmap`; by default where it is expected to
                be faster. The draws are the same either way, and where an operation can't be vectorized they run
                sequentially anyhow.
            linearized: whether the draws go through the network's linear expansion at the means, f(mu) + J(mu)(w − mu),
                which the posteriors of `fit_sigma` are those of (Immer et al. 2021, arXiv:2008.08400).
            gradients: whether the samples have gradients by the inputs, mu and rho, as for adversarial inputs or an
                acquisition function. All draws' activations are then kept until backward.
            kwargs: of the network.

        Returns:
            A `Prediction`; for a network that returns a structure, that structure with a `Prediction` for each tensor;
            for a nested tensor, a tuple of them.

        Raises:
            ArgumentError: n_samples is no positive integer; joint, linearized or gradients is no boolean; linearized,
                and an operation has no derivative; a loader in the place of inputs.
        """
        for name, flag in (("joint", joint), ("linearized", linearized), ("gradients", gradients)):
            one_of(name, flag, (True, False))
        vnet: Any = self
        within: Any = nullcontext()
        if seed is not None:
            within = seeded(nonnegative_int("seed", seed, bits=64), cuda_devices(vnet.posteriors))
        # a seed promises networks, the same ones for any batch, and a choice of `vectorize` the same draws either way
        way = None if joint and seed is None and vectorize is None else joint
        with within:
            found = outputs_of_draws(
                self, args, kwargs, n_samples, vectorize, joint=way, linearized=linearized, gradients=gradients
            )
        with torch.set_grad_enabled(gradients):
            return gather(found.outputs, outputs, class_dim, found.vectorized)

    def ensemble(self, n_samples: int = 32, *, seed: int | None = None, memory: int = MEMORY) -> Ensemble:
        """Networks drawn from the posterior of now, once: every call and every batch meets the same ones.

        Args:
            n_samples: number of draws.
            seed: of the draws; by default one from torch's generator. Of the same posterior it gives the same networks
                again, on any device, and more of them if `n_samples` is larger.
            memory: bytes that draws may take; those beyond are made again in each call.

        Returns:
            An `Ensemble`, with `predict`, `predict_loader`, `len`, iteration, and `ensemble[i]` as a plain module. It
            has a copy of this module, and doesn't change if this is trained on.

        Raises:
            ArgumentError: n_samples is no positive integer, seed no integer of at least 0; not enough memory.
            StructureError: the parameters are in parts (FSDP2).
        """
        n_samples, memory = positive_int("n_samples", n_samples), nonnegative_int("memory", memory)
        seed = int(torch.randint(2**62, ())) if seed is None else nonnegative_int("seed", seed, bits=64)
        refuse_sharded(self, "ensemble()")
        generator = torch.Generator().manual_seed(seed)
        seeds = [int(torch.randint(2**62, (), generator=generator)) for _ in range(n_samples)]
        return Ensemble(copy.deepcopy(self), seeds, memory)


@torch.no_grad()
def generate(vnet: nn.Module, *args: object, **kwargs: object) -> Any:
    """The network's own `generate`: within `vnet.sampling()` with one draw of the weights for all of the call.

    Otherwise with the means. A draw in each forward would give every token of a sequence other weights. A batch's
    sequences share the draw: call it once for each that is to have its own.

    Args:
        vnet: a variational module around a network that has `generate`, such as those of transformers and PEFT.
        args: of that, as are `kwargs`.
        kwargs: likewise.

    Raises:
        ModelError: vnet is no variational module, or its network has no `generate`.
    """
    check_variational(vnet, "varify.generate")
    own: Any = vnet
    if not hasattr(own.module, "generate"):
        raise ModelError(f"the {type(own.module).__name__} within has no generate(), which those of transformers have")
    posteriors = own.posteriors
    theta = posteriors.draw(own.drawing.noise) if own.drawing.always else posteriors.masked_means()
    return own.engine.views.run(lambda network: network.generate(*args, **kwargs), theta, training=False)


def outputs_of_draws(
    vnet: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    n_samples: int,
    vectorize: bool | None = None,
    *,
    joint: bool | None = True,
    linearized: bool = False,
    gradients: bool = False,
) -> Draws:
    """What the network returns in eval mode for each of many draws; see `VariationalModule.predict`.

    `joint=None` is whichever way is faster where both give the output one distribution.
    """
    if linearized:
        refuse_nested(vnet, "linearized=True")
    if linearized and gradients:
        raise ArgumentError("linearized=True has no gradients: leave out gradients=True, or linearized=True")
    with torch.set_grad_enabled(gradients), gathered(vnet), sharing_sigma(vnet):
        engine = vnet.engine
        means = means_of(vnet) if linearized else None

        def within(network: nn.Module, _: Mapping[str, Any]) -> Any:
            return sampling(network)

        def take(number: int) -> list[dict[str, Tensor]]:
            return [engine.posteriors.draw(vnet.drawing.noise) for _ in range(number)]

        draws: Draws | None = None
        if not joint and not linearized and vnet.drawing.noise is None:
            way = engine.sampler.outputs_of_one if joint is None else engine.sampler.separate_outputs
            draws = way(args, kwargs, n_samples, vectorize, within)
        return draws or engine.sampler.outputs(args, kwargs, take, n_samples, vectorize, within, means)
