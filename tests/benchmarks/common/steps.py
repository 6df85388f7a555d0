"""One training step of a workload: plain, by varify, and by peers that are installed."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import varify
from tests.benchmarks.common.workloads import NUM_DATA, Workload

Step = Callable[[], object]
ESTIMATORS = ("weights", "local", "flipout", "auto")
# By name: the module to import, and the package that has it.
PEERS = {
    "torchbayesian": ("torchbayesian", "torchbayesian"),
    "torchbnn": ("torchbnn", "torchbnn"),
    "bayesian-torch": ("bayesian_torch", "bayesian-torch"),
    "blitz": ("blitz", "blitz-bayesian-pytorch"),
    "ivon-opt": ("ivon", "ivon-opt"),
}


def absent() -> list[str]:
    """Peers that are not installed."""
    return [name for name, (module, _) in PEERS.items() if importlib.util.find_spec(module) is None]


def adam(network: nn.Module) -> torch.optim.Optimizer:
    """Fused Adam."""
    return torch.optim.Adam(network.parameters(), lr=1e-4, fused=True)


def plain(work: Workload) -> Step:
    """The network as it is."""
    network, optimizer = work.network.train(), adam(work.network)

    def step() -> None:
        optimizer.zero_grad()
        work.criterion(network(*work.inputs), work.targets).backward()
        optimizer.step()

    return step


def with_varify(
    work: Workload,
    estimator: str,
    optimizer: str = "adam",
    compiled: bool = False,
    options: dict[str, Any] | None = None,
) -> Step:
    """The network with every parameter variational, and the ELBO; `options` are torch.compile's."""
    vnet = varify.variationalize(work.network, estimator=estimator).train()
    work = Workload(nn.Identity(), work.inputs, work.targets)  # the plain network is not needed any more
    elbo = varify.ELBO(num_data=NUM_DATA)
    chosen = adam(vnet) if optimizer == "adam" else varify.optim.IVON(vnet, num_data=NUM_DATA)

    def terms() -> tuple[Tensor, Tensor]:
        found = elbo(vnet, work.criterion, work.inputs, work.targets)
        return found.loss, found.nll

    objective = torch.compile(terms, options=options) if compiled else terms

    def step() -> None:
        chosen.zero_grad()
        if optimizer == "adam":
            objective()[0].backward()
        else:  # IVON needs no divergence
            work.criterion(vnet(*work.inputs), work.targets).backward()
        chosen.step()

    return step


def compiled_plain(work: Workload) -> Step:
    """The plain network under torch.compile."""
    return plain(Workload(torch.compile(work.network), work.inputs, work.targets))  # type: ignore[arg-type]


def with_peer(work: Workload, peer: str) -> Step:
    """The network converted by a peer, or trained by its optimizer.

    Raises:
        Exception: whatever the peer raises where it can't convert the network.
    """
    if peer == "ivon-opt":
        return _ivon_opt(work)
    network, kl = {
        "torchbayesian": _torchbayesian,
        "torchbnn": _torchbnn,
        "bayesian-torch": _bayesian_torch,
        "blitz": _blitz,
    }[peer](work.network.train())
    optimizer = adam(network)

    def step() -> None:
        optimizer.zero_grad()
        loss = work.criterion(network(*work.inputs), work.targets)
        (loss + kl() / NUM_DATA).backward()
        optimizer.step()

    return step


Converted = tuple[nn.Module, Callable[[], Any]]


def _torchbayesian(network: nn.Module) -> Converted:
    from torchbayesian.bnn import BayesianModule

    converted = BayesianModule(network)
    return converted, converted.kl_divergence


def _torchbnn(network: nn.Module) -> Converted:
    # Its converter can't read the layers of this torch; the layers themselves work.
    from torchbnn.modules import BayesConv2d, BayesLinear, BKLLoss

    def linear(n: int, m: int, **settings: Any) -> nn.Module:
        return BayesLinear(0, 0.1, n, m, **settings)

    def convolution(n: int, m: int, size: Any, **settings: Any) -> nn.Module:
        return BayesConv2d(0, 0.1, n, m, size, **settings)

    _replace_layers(network, linear, convolution)
    loss = BKLLoss(reduction="sum", last_layer_only=False)
    return network, lambda: loss(network)


def _bayesian_torch(network: nn.Module) -> Converted:
    # Only linear layers, convolutions and LSTMs become variational.
    from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn, get_kl_loss

    settings = {"prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": -4.0}
    dnn_to_bnn(network, {**settings, "type": "Reparameterization", "moped_enable": False, "moped_delta": 0.5})
    return network, lambda: get_kl_loss(network)


def _blitz(network: nn.Module) -> Converted:
    # It has layers and converts nothing.
    from blitz.modules import BayesianConv2d, BayesianLinear
    from blitz.utils import variational_estimator

    _replace_layers(network, BayesianLinear, BayesianConv2d)

    @variational_estimator
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, *inputs: Tensor) -> Any:
            return self.network(*inputs)

    converted = Network()
    return converted, converted.nn_kl_divergence


def _replace_layers(module: nn.Module, linear: Callable[..., nn.Module], convolution: Callable[..., nn.Module]) -> None:
    """Put a peer's layers in the places of linear layers and 2-d convolutions."""
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            new = linear(child.in_features, child.out_features, bias=child.bias is not None)
        elif type(child) is nn.Conv2d:
            settings = {"stride": child.stride, "padding": child.padding, "dilation": child.dilation}
            settings |= {"groups": child.groups, "bias": child.bias is not None}
            new = convolution(child.in_channels, child.out_channels, child.kernel_size, **settings)
        else:
            _replace_layers(child, linear, convolution)
            continue
        setattr(module, name, new.to(child.weight.device))


def _ivon_opt(work: Workload) -> Step:
    import ivon

    network = work.network.train()
    optimizer = ivon.IVON(network.parameters(), lr=0.1, ess=NUM_DATA, weight_decay=1 / NUM_DATA, hess_init=1.0)

    def step() -> None:
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            work.criterion(network(*work.inputs), work.targets).backward()
        optimizer.step()

    return step
