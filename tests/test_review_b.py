"""What a hard reading of the store, its state and its neighbors found, each held by a test."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import varify
from varify.priors import registry
from varify.state import read_extra_state


def vnet_of(**options: Any) -> varify.VariationalModule:
    torch.manual_seed(0)
    return varify.variationalize(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), **options)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
def test_a_compiled_network_in_eval_mode_sees_what_is_pruned_later() -> None:
    vnet, x = vnet_of().eval(), torch.randn(5, 4)
    compiled = torch.compile(vnet, backend="eager")
    compiled(x)
    varify.prune(vnet, 0.5)
    with torch.no_grad():
        for mean in vnet.module.parameters():
            mean.add_(0.5)  # as momentum moves them
    torch.testing.assert_close(compiled(x), vnet(x))


def test_estimators_that_were_loaded_serve_from_the_next_call_on() -> None:
    vnet = vnet_of(estimator={"0.*": "local", "2.*": "weights"})
    other = vnet_of(estimator={"0.*": "weights", "2.*": "local"})
    x = torch.ones(6, 4)
    for _ in range(2):
        vnet(x)
    vnet.load_state_dict(other.state_dict())
    seen: list[Tensor] = []
    vnet.module[0].register_forward_hook(lambda module, args, output: seen.append(output))
    for _ in range(2):
        vnet(x)
    assert all((rows == rows[0]).all() for rows in seen)  # one draw of the first layer, for all rows
    lines = str(vnet.summary()).splitlines()
    assert [("local" in line) for line in lines if line.startswith(("0.weight", "2.weight"))] == [False, True]


class Sharp(varify.priors.Gaussian):
    def __init__(self, std: float = 1.0, power: float = 2.0) -> None:
        super().__init__(std=std)
        self.keep_positive(power=power)

    def log_prob(self, w: Tensor) -> Tensor:
        return -(w / self.std).abs().pow(self.power).sum()


def test_a_subclass_of_the_gaussian_prior_keeps_its_density() -> None:
    vnet = vnet_of(prior=Sharp(2.0, power=4.0), init=varify.inits.Constant(1e-4))
    q = vnet.posteriors["0.weight"]
    assert type(q.prior) is Sharp
    assert (q.prior.std, q.prior.power) == (2.0, 4.0)
    expected = -q.entropy() + (q.mu / 2.0).abs().pow(4).sum()  # sigma is next to nothing
    torch.testing.assert_close(q.kl_divergence(), expected, rtol=1e-3, atol=0)
    with pytest.raises(varify.PriorError, match="matches no parameter with a Gaussian prior"):
        varify.fit_prior(vnet)
    with pytest.raises(varify.PriorError, match=r"0\.weight: Sharp"):
        varify.optim.IVON(vnet, num_data=9)
    assert "at the prior" not in str(vnet.summary())
    assert "at-prior" in varify.diagnose(vnet).unchecked


def test_a_class_of_anothers_name_is_not_taken_for_it() -> None:
    ours = type("ScaleMixture", (varify.priors.ScaleMixture,), {"__module__": __name__, "__qualname__": "ScaleMixture"})
    kind = registry.kind_of(ours)
    assert kind == f"{__name__}:ScaleMixture"
    assert registry.of_kind(kind) is ours
    assert registry.of_kind("mixtgauss") is varify.priors.ScaleMixture
    with pytest.raises(varify.PriorError, match=r"the name 'mixtgauss' is taken by varify\.priors\.mixture"):
        varify.priors.register("mixtgauss")(ours)


def test_a_shared_variational_part_stays_shared_in_ordinary_networks() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = varify.variationalize(nn.Linear(3, 3))
            self.out = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.b(self.a(x)))

    vnet = varify.variationalize(Twice())
    for model in (vnet.mean_model(), vnet.sample_model()):
        assert model.a is model.b
        assert len(list(model.parameters())) == 4


def tied(module: nn.Module) -> None:
    module[2].weight = module[1].weight


def of_another_shape(module: nn.Module) -> None:
    module[1].weight = nn.Parameter(torch.zeros(1, 4))


def taken_out(module: nn.Module) -> None:
    module[1].bias = None


@pytest.mark.parametrize("change", [tied, of_another_shape, taken_out])
def test_what_changes_parameters_later_is_refused(change: Any) -> None:
    vnet = varify.variationalize(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))))
    vnet.prior_loss()
    change(vnet.module)
    for ask in (vnet.prior_loss, lambda: vnet(torch.ones(2, 4)), lambda: copy.deepcopy(vnet).prior_loss()):
        with pytest.raises(varify.StructureError, match=r"conversion|before it"):
            ask()


def test_a_schedule_is_asked_once_a_step() -> None:
    asked: list[int] = []
    elbo = varify.ELBO(num_data=9, beta=lambda step: float(asked.append(step) or 1.0))
    elbo(vnet_of(), F.cross_entropy, torch.ones(2, 4), torch.tensor([0, 1]))
    assert asked == [0]


class Scalar(varify.inits.Init):
    def __call__(self, w: Tensor, prior_std: Tensor) -> tuple[Tensor, Tensor]:
        return w, prior_std.mean()


class Alone(varify.inits.Init):
    def __call__(self, w: Tensor, prior_std: Tensor) -> Any:
        return w


class NoInit(varify.priors.Gaussian):
    def __init__(self, scale: float) -> None:  # forgets super().__init__()
        object.__setattr__(self, "scale", scale)


def drawn_with(noise: dict[str, Tensor]) -> None:
    with vnet_of().fixed_draw(noise):
        pass


def test_a_summary_leaves_the_random_numbers_alone() -> None:
    vnet = vnet_of(prior=torch.distributions.Cauchy(0.0, 1.0))
    before = torch.get_rng_state()
    vnet.summary()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_gaussian_prior_without_a_std_in_a_checkpoint_is_refused() -> None:
    vnet = vnet_of()
    state = dict(vnet.state_dict())
    state["_extra_state"] = read_extra_state(state["_extra_state"])
    state["_extra_state"]["priors"]["0.weight"]["std"] = None
    with pytest.raises(varify.PriorError, match=r"of 0\.weight: std must be a number"):
        vnet.load_state_dict(state)


REFUSED: list[tuple[Any, type[Exception], str]] = [
    (
        lambda: vnet_of(init=Scalar()),
        varify.InitError,
        r"Scalar must return mu and rho, each of shape \(8, 4\)",
    ),
    (lambda: vnet_of(init=Alone()), varify.InitError, r"0\.weight: Alone must return mu and rho"),
    (
        lambda: vnet_of(prior=NoInit(1.0)),
        varify.PriorError,
        r"NoInit\.__init__ must call super\(\)\.__init__\(\) first",
    ),
    (lambda: varify.priors.register("x")(nn.Linear), varify.PriorError, "must be a subclass of varify.priors.Prior"),
    (lambda: varify.priors.register(Sharp), varify.PriorError, "register takes the name"),
    (lambda: varify.inits.register("x")(nn.Linear), varify.InitError, "must be a subclass of varify.inits.Init"),
    (lambda: varify.inits.register(Scalar), varify.InitError, "register takes the name"),
    (
        lambda: drawn_with({"wieght": torch.ones(3)}),
        varify.ArgumentError,
        "noise must be by .* name, got 'wieght'",
    ),
    (lambda: drawn_with({"0.bias": torch.ones(())}), varify.ArgumentError, r"noise of 0\.bias must have shape \(8,\)"),
    (lambda: vnet_of(batch_dim="x"), varify.ArgumentError, "batch_dim must be an integer of at least 0, got 'x'"),
    (lambda: vnet_of(batch_dim=-7), varify.ArgumentError, "batch_dim must be an integer of at least 0, got -7"),
    (lambda: vnet_of(init={"fc*": "moped"}), varify.SelectionError, r"the glob 'fc\*' matches no parameter"),
    *(
        (lambda use=use: use(nn.Linear(3, 2)), varify.ModelError, r"varify\.variationalize\(network\) makes one")
        for use in (
            varify.fit_prior,
            lambda net: varify.fit_sigma(net, [], F.cross_entropy, num_data=3),
            lambda net: varify.prune(net, 0.5),
            lambda net: varify.description_length(net, [], F.cross_entropy),
            lambda net: varify.kl_weight(net, 10),
        )
    ),
]


@pytest.mark.parametrize(("make", "error", "told"), REFUSED)
def test_what_is_refused_says_so(make: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        make()


def test_a_diagnosis_takes_the_beta_of_an_objective_that_was_not_called() -> None:
    elbo = varify.ELBO(num_data=100)
    batch = torch.randn(16, 4), torch.randint(3, (16,))
    found = varify.diagnose(vnet_of().train(), None, F.cross_entropy, batch=batch, num_data=100, beta=elbo.beta)
    assert isinstance(found, varify.Diagnosis)
