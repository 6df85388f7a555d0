"""Each illness that `diagnose` knows, in a network that has it and no other; and what it leaves as it was."""

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import varify
from varify.analysis.evidence import Evidence, FirstBatch, posteriors_of
from varify.inits import Constant
from varify.priors import Gaussian, ScaleMixture


def classes(n: int = 1000, batch: int = 16) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch, shuffle=True)


def numbers(n: int = 1000) -> DataLoader:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x[:, :2] + 3.0), 16)


def network(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, outputs))


def made(**options: Any) -> varify.VariationalModule:
    return varify.variationalize(network(), **options).train()


def diagnosed(vnet: nn.Module, loader: Any = None, criterion: Any = F.cross_entropy, **options: Any) -> Any:
    return varify.diagnose(vnet, classes() if loader is None else loader, criterion, **{"num_data": 1000, **options})


def named(diagnosis: varify.Diagnosis, name: str) -> varify.Finding:
    (found,) = (finding for finding in (*diagnosis, *diagnosis.fine) if finding.name == name)
    return found


ALL = {
    *(
        "not-finite",
        "not-finite-loss",
        "eval-mode",
        "at-prior",
        "collapsed",
        "kl-dominates",
        "num-data",
        "summed-criterion",
        "squared-error",
    ),
    *("gradient-noise", "tiny-batch-norm", "equal-draws", "noise-dominates"),
}


@pytest.mark.parametrize("estimator", ["weights", "auto"])
def test_a_healthy_network_has_nothing(estimator: str) -> None:
    found = diagnosed(made(estimator=estimator))
    assert not found, found
    assert {finding.name for finding in found.fine} == ALL
    assert not found.unchecked


def test_what_was_not_given_is_not_checked_and_said() -> None:
    found = varify.diagnose(made())
    assert {finding.name for finding in found.fine} == {"not-finite", "eval-mode", "at-prior", "collapsed"}
    assert found.unchecked["kl-dominates"] == "needs a loader or batch and criterion and num_data"
    assert "unknown  equal-draws: needs a loader or batch" in str(found)
    assert set(varify.diagnose(made(), classes()).unchecked) == {
        *("not-finite-loss", "kl-dominates", "num-data", "summed-criterion", "squared-error"),
        *("gradient-noise", "noise-dominates"),
    }


# --- the weights


def test_eval_mode_with_gradients_on() -> None:
    vnet = made().eval()
    found = diagnosed(vnet)
    assert found.names == ["eval-mode"]
    assert "vnet.train()" in found[0].change
    assert named(found, "gradient-noise").figures["mu"] < 1e3  # as drawn: at the means there is no noise
    with torch.no_grad():
        assert not diagnosed(vnet)
    with vnet.sampling():
        assert not diagnosed(vnet)
    assert not diagnosed(vnet.train())


@pytest.mark.parametrize("name", ["mu", "rho"])
def test_weights_that_are_no_numbers(name: str) -> None:
    vnet = made()
    getattr(vnet.posteriors["0.weight"], name).data[0, 0] = float("nan")
    found = diagnosed(vnet)
    assert found.names == ["not-finite"]
    assert found[0].message.startswith("0.weight have a mu or rho")
    assert set(found.unchecked) >= {"kl-dominates", "gradient-noise", "equal-draws"}  # which nothing can be said of


def test_weights_at_the_prior() -> None:
    vnet = made()
    for name, q in vnet.posteriors.items():
        vnet.set_prior(Gaussian(mean=q.mu.detach() + 0.1 * q.sigma.detach(), std=q.sigma.detach()), where=name)
    found = diagnosed(vnet)  # at .005 nats each
    assert found.names == ["at-prior"]
    assert found[0].figures == {"share": 1.0}
    vnet.set_prior(Gaussian(std=0.1), where="0.*")  # 40 of 67
    assert named(diagnosed(vnet), "at-prior").figures["share"] == pytest.approx(27 / 67)


def test_the_prior_of_other_families_is_not_covered() -> None:
    vnet = made(prior={"0.*": ScaleMixture(1.0, 0.1, 0.5)})
    assert "not covered, for want of a Gaussian prior: 0.weight, 0.bias" in named(diagnosed(vnet), "at-prior").message
    vnet.set_prior(ScaleMixture(1.0, 0.1, 0.5))
    assert diagnosed(vnet).unchecked["at-prior"].startswith("the KL of a single weight is known for Gaussian priors")


def test_collapsed_weights() -> None:
    vnet = made(init={"0.*": Constant(1e-6)})
    found = diagnosed(vnet)
    assert found.names == ["collapsed"]
    assert found[0].figures["share"] == pytest.approx(40 / 67)
    # small beside a wide prior, and not beside the weights
    assert named(diagnosed(made(init=Constant(1e-2), prior=Gaussian(std=1e3))), "collapsed").severity == "fine"
    # means of 0, and a prior that tells no std
    zero = varify.variationalize(nn.Linear(4, 3), init=Constant(1e-6), prior="gaussian").train()
    zero.module.weight.data.zero_()
    assert named(diagnosed(zero), "collapsed").figures["share"] == 1.0


def test_the_mask_of_pruned_weights_is_left_out() -> None:
    vnet = made()
    varify.prune(vnet, 0.9)
    assert named(diagnosed(vnet), "collapsed").figures["share"] == 0.0
    varify.prune(vnet, threshold=float("inf"))
    found = varify.diagnose(vnet)
    assert "at-prior" in found.unchecked
    assert found.unchecked["collapsed"] == "no weight is random"


# --- the objective


def test_a_divergence_that_outweighs_the_data() -> None:
    vnet = made(init="relative")
    found = diagnosed(vnet, classes(60), num_data=60, beta=1.0)
    assert found.names == ["kl-dominates", "noise-dominates"]  # it is not trained yet
    kl, share = vnet.prior_loss().item() / 60, found[0].figures["share"]
    assert found[0].figures["kl"] == pytest.approx(kl)
    assert share == pytest.approx(kl / (kl + found[0].figures["nll"]))
    assert "kl-dominates" not in diagnosed(vnet, classes(60), num_data=60, beta=0.1).names


@pytest.mark.parametrize(("scale", "severity"), [(0.0, "error"), (0.2, "warning"), (5.0, "fine")])
def test_a_divergence_that_outweighs_the_data_is_as_ill_as_little_was_learned(scale: float, severity: str) -> None:
    vnet = varify.variationalize(nn.Linear(4, 3)).train()
    with torch.no_grad():
        vnet.module.weight.copy_(scale * torch.eye(4)[:3])  # the larger, the surer of the answer
        vnet.module.bias.zero_()
        vnet.posteriors["weight"].rho.fill_(-6.0)
    loader = classes(60)
    finding = named(diagnosed(vnet, loader, num_data=60, beta=9.0), "kl-dominates")
    assert finding.severity == severity
    x, y = loader.dataset.tensors
    p = torch.softmax(scale * x[:, :3], 1)  # by the means; of all data and all their other labels, not of a batch
    own, other = -p[range(60), y].log().mean(), -(p.log().mean(0)[y]).mean()
    assert finding.figures["learned"] == pytest.approx(float(1 - own / other), abs=0.15)
    assert finding.figures["share"] > 0.5


def test_a_negative_log_likelihood_below_zero_is_no_share_of_the_loss() -> None:
    criterion = lambda output, target: F.cross_entropy(output, target) - 9  # noqa: E731
    assert "is not positive" in diagnosed(made(), criterion=criterion).unchecked["kl-dominates"]


@pytest.mark.parametrize(
    ("num_data", "message"),
    [(16, "num_data=16, the size of the batch, but there are 1000"), (500, "num_data=500, but there are 1000")],
)
def test_a_divergence_divided_by_less_than_the_data(num_data: int, message: str) -> None:
    for loader in (classes(), list(classes())):
        found = diagnosed(made(), loader, num_data=num_data, beta=0.01)
        assert found.names == ["num-data"]
        assert found[0].message.startswith(message)
        assert found[0].severity == "error"


def test_num_data_beside_one_batch() -> None:
    batch = next(iter(classes()))
    found = [varify.diagnose(made(), None, F.cross_entropy, batch=batch, num_data=n, beta=0.01) for n in (10, 16, 17)]
    assert [f.names for f in found] == [["num-data"], ["num-data"], []]
    assert [f[0].severity for f in found[:2]] == ["error", "warning"]
    assert not diagnosed(made(), classes(16), num_data=16, beta=0.01)  # all the data are one batch


@pytest.mark.parametrize("scale", [1.0, 1 / 16])
def test_a_criterion_that_is_a_sum(scale: float) -> None:
    criterion = lambda output, target: scale * F.cross_entropy(output, target, reduction="sum")  # noqa: E731
    found = diagnosed(made(), criterion=criterion)
    assert found.names == ["summed-criterion"]
    assert found[0].figures["ratio"] == pytest.approx(2.0)
    assert "nll per datum is unknown" in found.unchecked["kl-dominates"]


def test_criteria_of_which_it_can_not_be_told() -> None:
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": self.net(x).square().mean(), "logits": self.net(x)}

    vnet = varify.variationalize(WithLoss()).train()
    found = diagnosed(vnet, criterion=lambda output, _: output["loss"])
    assert found.unchecked == {"summed-criterion": "the network computes the loss itself"}

    class Opaque(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(logits=super().forward(x))

    opaque = varify.variationalize(Opaque(network())).train()
    unknown = diagnosed(opaque, criterion=lambda output, y: F.cross_entropy(output.logits, y)).unchecked
    assert set(unknown) == {"summed-criterion", "squared-error", "equal-draws", "noise-dominates"}
    neither = diagnosed(made(), criterion=lambda output, target: output.square().sum().sqrt())
    assert neither.unchecked["summed-criterion"].startswith("the criterion is neither mean nor sum")
    refusing = diagnosed(made(), criterion=lambda output, y: F.cross_entropy(output.reshape(16, 3), y))
    assert refusing.unchecked["summed-criterion"].startswith("the criterion takes no batch of twice the size (Runtime")


@pytest.mark.parametrize(
    ("criterion", "var"), [(F.mse_loss, 1.0), (lambda output, y: (output - y).square().sum(1).mean(), None)]
)
def test_a_squared_error_is_no_likelihood(criterion: Any, var: float | None) -> None:
    vnet = varify.variationalize(network(2)).train()
    found = diagnosed(vnet, numbers(), criterion)
    if var is None:  # the sum over a datum's targets is known by nothing
        assert not found
        return
    assert found.names == ["squared-error"]
    assert found[0].figures["var"] == var  # ½ for each of two targets, of which mse_loss is the mean
    # which is what it says: the likelihood of that variance has the same gradient
    output, y = torch.randn(5, 2, requires_grad=True), torch.randn(5, 2)
    likelihood = varify.GaussianLikelihood(sigma=var**0.5, learn=False)
    grads = [torch.autograd.grad(f(output, y), output)[0] for f in (criterion, likelihood)]
    torch.testing.assert_close(*grads)
    assert "varify.GaussianLikelihood()" in found[0].change
    assert not diagnosed(vnet, numbers(), varify.GaussianLikelihood())


def test_a_sum_of_squared_errors_is_both() -> None:
    vnet = varify.variationalize(network(2)).train()
    found = diagnosed(vnet, numbers(), nn.MSELoss(reduction="sum"))
    assert found.names == ["summed-criterion", "squared-error"]
    assert found[1].figures["var"] == 0.5


# --- the batch


def test_gradients_that_are_noise() -> None:
    vnet = made(prior=Gaussian(std=20.0), init=Constant(10.0), estimator="weights")
    found = diagnosed(vnet)
    assert found.names == ["gradient-noise", "noise-dominates"]
    assert found[0].figures["mu"] < 1 / 19
    assert "estimator='auto'" in found[0].change


def test_signal_to_noise_is_that_of_linear_algebra() -> None:
    """One weight: y = w, nll = (w − 1)²/2, so that dnll/dmu = mu + sigma·eps − 1."""
    vnet = varify.variationalize(nn.Linear(1, 1, bias=False), init=Constant(2.0)).train()
    vnet.module.weight.data.fill_(4.0)
    batch = torch.ones(1, 1), torch.ones(1, 1)
    criterion = lambda output, y: 0.5 * (output - y).square().mean()  # noqa: E731
    found = varify.diagnose(vnet, None, criterion, batch=batch, n_draws=4000)
    # the variance of 4,000 draws is known within 2.2 %, the squared mean within 2.1 %: 5 standard errors
    assert named(found, "gradient-noise").figures["mu"] == pytest.approx((4 - 1) ** 2 / 2**2, rel=0.16)


def test_the_noise_is_that_of_the_estimator() -> None:
    """Of 10,000 data, of which each has its own: 9/4 · 10,000, and not 9/4 as with drawn weights."""
    vnet = varify.variationalize(nn.Linear(1, 1, bias=False), init=Constant(2.0), estimator="local").train()
    vnet.module.weight.data.fill_(4.0)
    batch = torch.ones(10_000, 1), torch.ones(10_000, 1)
    criterion = lambda output, y: 0.5 * (output - y).square().mean()  # noqa: E731
    torch.manual_seed(0)
    found = varify.diagnose(vnet, None, criterion, batch=batch, n_draws=2)
    assert named(found, "gradient-noise").figures["mu"] > 1000


def test_frozen_means_have_no_noise() -> None:
    found = diagnosed(made(learn_mu=False))
    assert set(named(found, "gradient-noise").figures) == {"rho"}
    assert diagnosed(made(learn_mu=False, learn_rho=False)).unchecked["gradient-noise"].startswith("no mu and no rho")


def test_batch_normalization_of_tiny_batches() -> None:
    torch.manual_seed(0)
    normed = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    vnet = varify.variationalize(normed).train()
    found = diagnosed(vnet, classes(batch=4))
    assert found.names == ["tiny-batch-norm"]
    assert found[0].figures == {"batch": 4}
    assert "1 normalize" in found[0].message
    assert not diagnosed(vnet, classes(batch=16))
    vnet.module[1].eval()
    assert not diagnosed(vnet, classes(batch=4))


def test_draws_that_predict_the_same() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = network(), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return 1000 + self.used(x)

    found = diagnosed(varify.variationalize(Unused(), where="unused.*").train())
    assert found.names == ["equal-draws"]
    assert found[0].figures["draws"] == 0.0
    assert not diagnosed(varify.variationalize(Unused()).train())


# --- around it


@pytest.mark.parametrize("zero", [0.0, 9.0])  # of the criterion, which a density's may have anywhere
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_noise_of_the_weights_that_drowns_what_the_means_know(offset: float, zero: float) -> None:
    """Outputs of a linear network are Gaussian over draws, of a variance that is the sum of those of their terms."""
    vnet = varify.variationalize(nn.Linear(4, 3), where="weight").train()
    with torch.no_grad():
        vnet.module.weight.copy_(torch.eye(4)[:3])
        vnet.module.bias.copy_(offsets := offset * torch.arange(3.0))  # which says nothing of the data
    x, y = classes().dataset.tensors
    others = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]  # that nobody could have learned
    criterion = lambda output, target: F.cross_entropy(output - offsets, target) - zero  # noqa: E731
    for sigma, targets, names in ((0.1, others, []), (0.9, y, []), (0.9, others, ["noise-dominates"])):
        with torch.no_grad():
            vnet.posteriors["weight"].rho.fill_(math.log(math.expm1(sigma)))
        found = varify.diagnose(vnet, None, criterion, batch=(x, targets), num_data=2000, beta=0.01, n_draws=400)
        assert found.names == names
        figures = named(found, "noise-dominates").figures
        # 400 draws of 12 weights: a relative standard error of 1 %
        assert figures["draws"] == pytest.approx(sigma * float(x.square().sum(1).mean().sqrt()), rel=0.05)
        assert figures["data"] == pytest.approx(float(x[:, :3].std(0, unbiased=False).square().mean().sqrt()), rel=0.05)


def test_few_draws_that_fit_by_chance_have_not_learned() -> None:
    """Of 16 draws that know nothing, the nll is 1 % less than with others' targets in many of 8 seeds, by chance; above
    three standard errors with a probability of 0.5 % each (Student's t of 15)."""
    vnet, (x, y) = made(prior=Gaussian(std=20.0), init=Constant(10.0)), classes().dataset.tensors
    by_chance = 0
    for seed in range(8):
        torch.manual_seed(seed)
        evidence = Evidence(vnet, posteriors_of(vnet), FirstBatch.of(vnet, x, y, None), F.cross_entropy, 2000, 1.0, 16)
        by_chance += evidence.trained.learned > 0.01
        others, losses = (part.double().numpy() for part in (evidence.trained.others, evidence.trained.losses))
        assert evidence.trained.gain == pytest.approx(stats.ttest_rel(others, losses).statistic, rel=1e-3)
        torch.manual_seed(seed)
        assert "noise-dominates" in varify.diagnose(vnet, None, F.cross_entropy, batch=(x, y)).names
    assert by_chance


def test_noise_without_targets_to_compare_is_unknown() -> None:
    vnet, (x, y) = made(init=Constant(10.0)), classes().dataset.tensors
    same = varify.diagnose(vnet, None, F.cross_entropy, batch=(x[:16], torch.zeros(16, dtype=torch.long)))
    assert "for want of data with other targets" in same.unchecked["noise-dominates"]
    ignored = varify.diagnose(vnet, None, lambda output, _: output.square().mean(), batch=(x[:16], y[:16]))
    assert "noise-dominates" in ignored.unchecked
    broken = varify.diagnose(vnet, None, F.mse_loss, batch=(x[:16], torch.full((16, 3), math.nan)))
    assert "the loss is not finite" in broken.unchecked["noise-dominates"]


def test_a_part_of_a_plain_network_and_one_within_data_parallel() -> None:
    torch.manual_seed(0)
    head = varify.variationalize(nn.Linear(8, 3), init=Constant(1e-7))
    plain = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), head).train()
    found = diagnosed(plain)
    assert found.names == ["collapsed", "equal-draws"]
    assert found.network == "Sequential"
    assert not diagnosed(nn.DataParallel(made()) if not torch.cuda.is_available() else made())


class Counting(nn.Module):
    """Has dropout, a normalization, a buffer, a number and a list that its forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        self.register_buffer("calls", torch.zeros(()))
        self.number, self.kept = 0, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.number += 1
        self.kept.append(self.number)
        return self.net(x)


class Scaled(nn.Module):
    """A criterion with a parameter, and a buffer that it changes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        return self.scale * F.cross_entropy(output, target)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("estimator", ["weights", "auto"])
def test_everything_is_left_as_it_was(estimator: str, mode: bool) -> None:
    torch.manual_seed(0)
    vnet, criterion = varify.variationalize(Counting(), estimator=estimator).train(), Scaled()
    x, y = next(iter(classes()))
    vnet(x)
    (criterion(vnet(x), y) + vnet.prior_loss()).backward()
    vnet.train(mode)
    vnet.module.net[1].train(not mode)
    loader = DataLoader(classes().dataset, 16, shuffle=True, generator=torch.Generator().manual_seed(3))

    def state() -> list[Any]:
        tensors = [*vnet.state_dict().values(), *criterion.state_dict().values(), torch.get_rng_state()]
        tensors += [p.grad for part in (vnet, criterion) for p in part.parameters()]
        modes = [m.training for m in vnet.modules()]
        numbers = [vnet.module.number, *vnet.module.kept, random.getstate(), *modes]
        return [*(t.clone() for t in tensors if t is not None), loader.generator.get_state(), *numbers]

    before, pairs = state(), {name: (q.mu, q.rho) for name, q in vnet.posteriors.items()}
    first = varify.diagnose(vnet, loader, criterion, num_data=1000)
    for a, b in zip(before, state(), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    assert all(q.mu is pairs[name][0] and q.rho is pairs[name][1] for name, q in vnet.posteriors.items())
    assert str(varify.diagnose(vnet, loader, criterion, num_data=1000)) == str(first)  # the same numbers again


def test_it_works_without_gradients_and_in_a_fixed_draw() -> None:
    vnet = made()
    with torch.no_grad(), vnet.fixed_draw():
        assert not diagnosed(vnet)


def test_a_diagnosis_is_text_and_html() -> None:
    found = diagnosed(made().eval(), num_data=16, beta=0.01)
    assert found.names == ["num-data", "eval-mode"]  # worst first
    lines = str(found).splitlines()
    assert lines[0] == "Sequential: errors 1, warnings 1, fine 11, unknown 0"
    assert lines[1].startswith("error    num-data: num_data=16, the size of the batch")
    assert lines[2].startswith("         -> divide the KL by the size of the training set")
    assert repr(found) == str(found)
    assert found._repr_html_().count("<tr>") == 1 + len(ALL)
    assert bool(found)
    assert len(found) == 2


def test_sequences_first_and_named_inputs() -> None:
    torch.manual_seed(0)
    lstm = varify.variationalize(nn.LSTM(4, 8), batch_dim=1).train()
    x, y = torch.randn(5, 32, 4), torch.randint(8, (5, 32))
    criterion = lambda output, y: F.cross_entropy(output[0].flatten(0, 1), y.flatten())  # noqa: E731
    found = varify.diagnose(lstm, None, criterion, batch=({"input": x}, y), num_data=40)
    assert named(found, "num-data").figures["batch"] == 32
    assert named(found, "summed-criterion").severity == "fine"


def test_bad_input() -> None:
    vnet, batch = made(), next(iter(classes()))
    with pytest.raises(varify.ModelError, match=r"vnet must be a network with variational parts, got a Linear without"):
        varify.diagnose(nn.Linear(2, 2))
    with pytest.raises(varify.ModelError, match=r"vnet must be a network with variational parts, got str"):
        varify.diagnose("net")
    for options, message in (
        ({"loader": []}, r"loader must give a batch of \(inputs, targets\), got an empty one"),
        ({"loader": [batch], "batch": batch}, "loader and batch exclude each other"),
        ({"batch": torch.ones(3, 4)}, r"a batch must be \(inputs, targets\), got a Tensor"),
        ({"loader": [(batch[0],)]}, r"a batch must be \(inputs, targets\), got a tuple of 1"),
        ({"batch": (torch.ones(0, 4), torch.ones(0))}, "a batch must have data, got inputs of length 0"),
        ({"num_data": 0}, "num_data must be a positive integer, got 0"),
        ({"n_draws": 1}, "n_draws must be at least 2, .*, got 1"),
        ({"n_draws": 0}, "n_draws must be a positive integer, got 0"),
        ({"beta": "warm_up"}, "beta must be 'auto' or a number of at least 0, .*, got 'warm_up'"),
        ({"beta": -1}, "beta must be 'auto' or a number of at least 0, .*, got -1"),
        ({"criterion": 3}, r"criterion must be a function of \(output, targets\), .* got 3;"),
    ):
        with pytest.raises(varify.ArgumentError, match=message):
            varify.diagnose(vnet, **options)
    per_datum = lambda output, target: F.cross_entropy(output, target, reduction="none")  # noqa: E731
    with pytest.raises(varify.ArgumentError, match=r"the criterion must return a scalar, .*, got a tensor of shape"):
        diagnosed(vnet, criterion=per_datum)
