"""The contract of an initialization."""

import torch
import torch.nn.functional as F

from varify import inits
from varify.inits import InitLike
from varify.testing.checks import SmallNetwork, fixed_seed, or_else
from varify.variationalize import variationalize


class InitContract:
    """What varify asks of an initialization. Subclass it, and define `make`."""

    def make(self) -> InitLike:
        """The initialization, as it is given to `variationalize`."""
        raise NotImplementedError(f"{type(self).__name__} must define make(self): return the initialization")

    @fixed_seed()
    def test_mu_and_rho_fit_the_parameter(self) -> None:
        """They are finite, of its shape, in single precision at least; sigma is positive, also where a weight is 0."""
        for shape in ((), (5,), (3, 4), (2, 3, 3, 3)):
            for dtype in (torch.float32, torch.float64):
                w = torch.randn(shape, dtype=dtype)
                for given in (w, torch.zeros_like(w)):
                    started = inits.as_init(self.make())(given, torch.tensor(0.5, dtype=dtype).expand(shape))
                    for name, value in zip(("mu", "rho"), started, strict=True):
                        message = f"{name} of a parameter {shape} of {dtype} is {tuple(value.shape)} of {value.dtype}"
                        assert value.shape == shape, f"{message}: it must have the parameter's shape"
                        single = torch.promote_types(value.dtype, torch.float32) == value.dtype
                        assert single, f"{message}: it must be float32 or float64"
                        assert value.isfinite().all(), f"{name} is {value} where the weight is {given}"
                    sigma = F.softplus(started[1])
                    assert (sigma > 0).all(), f"sigma is {sigma} where the weight is {given}: no gradient could mend it"

    @fixed_seed()
    def test_what_is_given_is_not_changed(self) -> None:
        """The weight and the prior's standard deviation are not written into."""
        w, std = torch.randn(3, 4), torch.rand(4)
        before = w.clone(), std.clone()
        with or_else("The prior's standard deviation may be a view, not to be written into"):
            inits.as_init(self.make())(w, std.expand(3, 4))
        assert torch.equal(w, before[0]), "it wrote into w: use operations that make new tensors, or w.clone()"
        assert torch.equal(std, before[1]), "it wrote into prior_std: use operations that make new tensors"

    @fixed_seed()
    def test_networks_start_with_it(self) -> None:
        """`variationalize(init=...)` takes it, by name if it is registered, for half-precision networks too."""
        made = self.make()
        by_name = [name for name, known in inits._BY_NAME.items() if type(made) is known]
        for init in (made, *by_name):
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                network = SmallNetwork((3, 4)).to(dtype)
                before = network.weight.detach().clone()
                with or_else("An initialization returns mu and rho, and one with a name needs no arguments"):
                    vnet = variationalize(network, init=init)
                assert torch.equal(network.weight, before), "the network that is converted changed"
                assert vnet.prior_loss().isfinite(), f"the KL of a network of {dtype} is {vnet.prior_loss()}"
                assert vnet(torch.ones(3, 4, dtype=dtype)).dtype == dtype
                kinds = {q.rho.dtype for q in vnet.posteriors.values()}
                assert kinds == {torch.float32}, f"rho of a network of {dtype} is {kinds}: keep the dtype of w"
