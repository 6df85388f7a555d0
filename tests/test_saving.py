"""Files: what is written is read again, whole, without pickle; and what can't be is refused with a reason."""

import copy
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import varify
from tests.networks import CASES, seeded
from varify.priors import registry
from varify.state import read_extra_state


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 3, 3), bn=nn.BatchNorm2d(3), out=nn.Conv2d(3, 2, 1)))


def variational(**options: Any) -> varify.VariationalModule:
    vnet = varify.variationalize(network(), init=varify.inits.Normal(), **options)
    vnet(torch.randn(4, 1, 5, 5))  # BatchNorm's statistics move
    return vnet


def assert_same(found: varify.VariationalModule, expected: varify.VariationalModule) -> None:
    a, b = found.state_dict(), expected.state_dict()
    assert a.keys() == b.keys()
    for name, value in b.items():
        assert torch.equal(a[name], value) if isinstance(value, Tensor) else a[name] == value, name
    assert [(n, p.requires_grad) for n, p in found.named_parameters()] == [
        (n, p.requires_grad) for n, p in expected.named_parameters()
    ]
    told = []
    for one in (found, expected):
        torch.manual_seed(0)  # some divergences are estimates
        told.append(str(copy.deepcopy(one).summary()))  # of a copy, which has made no programs
    assert told[0] == told[1]


PRIORS = {
    "gaussian": varify.priors.Gaussian(),
    "centered": varify.priors.Gaussian(std=0.05, centered=True),
    "tensor": varify.priors.Gaussian(std=torch.tensor(0.25)),
    "conjugate": varify.priors.Conjugate(0.0, 3.0, 0.5, 0.7),
    "known mean": varify.priors.ConjugateKnownMean(0.1, 0.5, 0.5),
    "mixture": varify.priors.ScaleMixture(1.0, 0.002, 0.5, n_mc_samples=3),
    "laplace": torch.distributions.Laplace(0.0, 0.1),
    "several": {"out.*": varify.priors.Gaussian(std=1 / 3)},
}


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS.keys())
def test_a_file_keeps_everything(prior: Any, tmp_path: Path) -> None:
    vnet = variational(prior=prior, estimator={"conv*": "flipout"}, strict=True)
    varify.prune(vnet, 0.3)
    vnet.rho.leaf_at("conv.bias").requires_grad_(False)
    varify.save(vnet, tmp_path / "net.safetensors")
    plain = network(seed=1)
    before = copy.deepcopy(plain.state_dict())
    loaded = varify.load(tmp_path / "net.safetensors", plain)
    assert_same(loaded, vnet)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, before[name])
    x = torch.randn(2, 1, 5, 5)
    seen = []
    for one in (vnet, loaded):
        torch.manual_seed(3)
        seen.append(one.predict(x, n_samples=3).samples)
    assert torch.equal(*seen)
    torch.manual_seed(1)
    loss = vnet.prior_loss()
    torch.manual_seed(1)
    assert torch.equal(loaded.prior_loss(), loss)
    assert list(tmp_path.iterdir()) == [tmp_path / "net.safetensors"]


@pytest.mark.parametrize(
    "name", ["tied", "called twice", "raw parameters", "lstm", "transformer", "weight norms", "cnn"]
)
def test_ties_and_all_kinds_of_parameters(name: str, tmp_path: Path) -> None:
    vnet = varify.variationalize(seeded(CASES[name]), init=varify.inits.Normal())
    varify.save(vnet, tmp_path / "a")
    loaded = varify.load(tmp_path / "a", seeded(CASES[name]))
    assert_same(loaded, vnet)
    names = dict(loaded.module.named_parameters(remove_duplicate=False))
    for n, p in vnet.module.named_parameters(remove_duplicate=False):
        for m, q in vnet.module.named_parameters(remove_duplicate=False):
            assert (p is q) == (names[n] is names[m])


def test_half_precision_and_views(tmp_path: Path) -> None:
    plain = network().bfloat16()
    plain.register_buffer("whole", torch.arange(6.0).reshape(2, 3).T)
    plain.register_buffer("part", plain.whole[:2])
    plain.register_buffer("empty", torch.zeros(0))
    plain.register_buffer("nothing", torch.zeros(0))
    vnet = varify.variationalize(plain, init=varify.inits.Normal())
    vnet.module.whole.add_(7)
    varify.save(vnet, tmp_path / "a")
    assert_same(varify.load(tmp_path / "a", copy.deepcopy(plain)), vnet)


def test_the_file_is_tensors_and_json(tmp_path: Path) -> None:
    vnet = variational(prior=varify.priors.ScaleMixture(1.0, 0.1, 0.5))
    varify.save(vnet, tmp_path / "a")
    with safe_open(tmp_path / "a", framework="pt") as file:
        settings = json.loads(file.metadata()["settings"])
        assert {*file.keys(), "_extra_state"} == set(vnet.state_dict())
    assert settings["extra"]["_extra_state"]["priors"]["conv.weight"]["sigma_2"] == 0.1
    assert settings["network"] == "Sequential"


def test_plain_checkpoints_pass_in_and_out(tmp_path: Path) -> None:
    plain, other = network(1), network(2)
    save_file(plain.state_dict(), tmp_path / "plain")
    vnet = varify.variationalize(other)
    vnet.module.load_state_dict(load_file(tmp_path / "plain"))
    x = torch.randn(2, 1, 5, 5)
    assert torch.equal(vnet.eval()(x), plain.eval()(x))
    third = network(3)
    third.load_state_dict(vnet.module.state_dict())
    assert torch.equal(third.eval()(x), plain(x))


def test_what_varify_did_not_write(tmp_path: Path) -> None:
    save_file(network().state_dict(), tmp_path / "plain")
    with pytest.raises(ValueError, match=r"not written by varify\.save; .* vnet\.module\.load_state_dict"):
        varify.load(tmp_path / "plain", network())
    save_file({"a": torch.zeros(1)}, tmp_path / "newer", {"varify": "99"})
    with pytest.raises(ValueError, match="format 99"):
        varify.load(tmp_path / "newer", network())
    with pytest.raises(FileNotFoundError, match="there is no file"):
        varify.load(tmp_path / "none", network())
    torch.save(network().state_dict(), tmp_path / "pickled")
    (tmp_path / "empty").touch()
    for name in ("pickled", "empty"):
        with pytest.raises(ValueError, match=rf"{name} is no safetensors file, or not whole \(.*is it of torch\.save"):
            varify.load(tmp_path / name, network())
    with pytest.raises(varify.ModelError, match="variational already"):
        varify.load(tmp_path / "plain", variational())


def test_another_network(tmp_path: Path) -> None:
    varify.save(variational(), tmp_path / "a")
    with pytest.raises(varify.StructureError, match=r"of a Sequential, and this Linear has no conv\.weight \(3, 1"):
        varify.load(tmp_path / "a", nn.Linear(2, 2))
    with pytest.raises(varify.ModelError, match=r"must be an nn\.Module"):
        varify.load(tmp_path / "a", "a name")  # type: ignore[arg-type]
    bigger = nn.Sequential(OrderedDict([*network().named_children(), ("more", nn.BatchNorm2d(2))]))
    with pytest.raises(varify.StructureError, match=r"(?s)another network than this Sequential.*module\.more\.weight"):
        varify.load(tmp_path / "a", bigger)


def test_what_cannot_be_written_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"helper": object()}

        def set_extra_state(self, state: Any) -> None: ...

    path = tmp_path / "a"
    varify.save(variational(), path)
    before = path.read_bytes()
    with pytest.raises(TypeError, match=r"module\._extra_state is a dict .* torch\.save"):
        varify.save(varify.variationalize(Odd(2, 2)), path)
    with pytest.raises(TypeError, match=r"vnet must be a variational module, got a Linear; see varify\.variationalize"):
        varify.save(nn.Linear(2, 2), path)  # type: ignore[arg-type]
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*no such folder"):
        varify.save(variational(), tmp_path / "no such folder" / "a")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        varify.save(variational(), tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
def test_a_compiled_network_is_saved_as_the_one_it_was_compiled_from(tmp_path: Path) -> None:
    vnet = variational()
    varify.save(torch.compile(vnet), tmp_path / "a")  # type: ignore[arg-type]
    assert_same(varify.load(tmp_path / "a", network()), vnet)


def test_a_custom_prior_whose_module_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    varify.save(variational(prior=varify.priors.ScaleMixture(1.0, 0.1, 0.5)), tmp_path / "a")
    monkeypatch.delitem(registry._BY_NAME, "mixtgauss")
    with pytest.raises(varify.PriorError, match=r"'mixtgauss' for conv\.weight; import the module that defines it"):
        varify.load(tmp_path / "a", network())


def test_a_custom_prior_that_is_not_registered_comes_back(tmp_path: Path) -> None:
    class Student(varify.priors.Prior):
        def __init__(self, df: float, scale: Any) -> None:
            super().__init__()
            self.keep_positive(df=df, scale=scale)

        def log_prob(self, w: Tensor) -> Tensor:
            return torch.distributions.StudentT(self.df, 0.0, self.scale).log_prob(w).sum()

    prior = Student(3.0, torch.tensor([[0.5], [2.0]]))
    vnet = varify.variationalize(nn.Linear(3, 2), prior={"weight": prior})
    varify.save(vnet, tmp_path / "a")
    loaded = varify.load(tmp_path / "a", nn.Linear(3, 2))
    other = varify.variationalize(nn.Linear(3, 2))
    other.load_state_dict(vnet.state_dict())
    for found in (loaded, other):
        assert type(found.posteriors["weight"].prior) is Student
        assert torch.equal(found.posteriors["weight"].prior.scale, prior.scale)
    state = dict(vnet.state_dict())
    state["_extra_state"] = read_extra_state(state["_extra_state"])
    state["_extra_state"]["priors"]["weight"]["kind"] = "their.module:Student"
    with pytest.raises(varify.PriorError, match=r"'their\.module:Student' for weight; import the module that defines"):
        other.load_state_dict(state)


def test_a_prior_with_settings_that_are_no_plain_values_is_refused(tmp_path: Path) -> None:
    class Odd(varify.priors.Gaussian):
        def settings(self) -> dict[str, Any]:
            return {"std": (1, 2)}

    vnet = varify.variationalize(nn.Linear(3, 2))
    vnet.prior.put_leaf("weight", Odd(std=1.0))
    for save in (lambda: varify.save(vnet, tmp_path / "a"), vnet.state_dict):
        with pytest.raises(varify.PriorError, match=r"the prior of weight, .* can't be saved|could not be loaded"):
            save()
    assert not list(tmp_path.iterdir())


def test_a_part_that_is_variational_itself(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 3), varify.variationalize(nn.Linear(3, 2), prior=PRIORS["mixture"]))

    vnet = varify.variationalize(make(), init=varify.inits.Normal())
    varify.prune(vnet.module[1], 0.5)
    vnet.module[1].rho.leaf_at("weight").requires_grad_(False)
    varify.save(vnet, tmp_path / "a")
    assert_same(varify.load(tmp_path / "a", make()), vnet)


def test_what_is_frozen_comes_back_frozen_and_the_file_is_everyones(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    plain[:2].requires_grad_(False)
    vnet = varify.variationalize(plain)
    varify.save(vnet, tmp_path / "a")
    fresh = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    assert_same(varify.load(tmp_path / "a", fresh), vnet)
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_versions_of_modules_are_kept(tmp_path: Path) -> None:
    class Migrates(nn.Linear):
        _version = 2

        def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
            if metadata.get("version") != 2:
                state[f"{prefix}weight"] = 2 * state[f"{prefix}weight"]
            super()._load_from_state_dict(state, prefix, metadata, *rest)

    vnet = varify.variationalize(nn.Sequential(Migrates(2, 2)))
    varify.save(vnet, tmp_path / "a")
    assert_same(varify.load(tmp_path / "a", nn.Sequential(Migrates(2, 2))), vnet)


@pytest.mark.parametrize("extra", [{1: "a"}, {"a": (1, 2)}, {"a": {1}}])
def test_extra_state_that_json_would_change_is_refused(extra: Any, tmp_path: Path) -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> Any:
            return extra

        def set_extra_state(self, state: Any) -> None: ...

    with pytest.raises(TypeError, match=r"module\._extra_state is a dict"):
        varify.save(varify.variationalize(Odd(2, 2)), tmp_path / "a")
    assert not list(tmp_path.iterdir())


class Buffered(nn.Linear):
    def __init__(self, buffer: Tensor) -> None:
        super().__init__(3, 2)
        self.register_buffer("table", buffer)


@pytest.mark.parametrize(
    ("buffer", "told"),
    [
        (torch.eye(3).to_sparse(), r"module\.table can't .* of layout torch\.sparse_coo; make it dense .* to_dense"),
        (torch.zeros(3, dtype=torch.complex128), r"module\.table can't .* of type torch\.complex128; .*view_as_real"),
        (torch.zeros(3, device="meta"), r"module\.table can't .* on the meta device"),
    ],
    ids=["sparse", "complex128", "meta"],
)
def test_tensors_that_such_files_cannot_hold_are_refused_by_name(buffer: Tensor, told: str, tmp_path: Path) -> None:
    vnet = varify.variationalize(Buffered(buffer))
    with pytest.raises(TypeError, match=f"{told}.*torch\\.save"):
        varify.save(vnet, tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64, torch.int16, torch.bool, torch.float8_e4m3fn])
def test_all_types_of_buffers_that_such_files_hold(dtype: torch.dtype, tmp_path: Path) -> None:
    vnet = varify.variationalize(Buffered(torch.tensor([0.0, 1.0, 2.0]).to(dtype)))
    varify.save(vnet, tmp_path / "a")
    found = varify.load(tmp_path / "a", Buffered(torch.zeros(3).to(dtype))).module.table
    assert found.dtype == dtype
    assert found.to(torch.complex64).tolist() == vnet.module.table.to(torch.complex64).tolist()


class Unregistered(varify.priors.Prior):
    def log_prob(self, w: Tensor) -> Tensor:
        return -w.abs().sum()


class Narrower(varify.priors.Gaussian):  # which has the name of its parent
    def log_prob(self, w: Tensor) -> Tensor:
        return 2 * super().log_prob(w)

    def for_parameter(self, w: Tensor, fan_in: int) -> "Narrower":
        return Narrower(std=0.1)


@pytest.mark.parametrize("prior", [Unregistered(), Narrower()], ids=["no name", "its parent's name"])
def test_priors_without_a_name_of_their_own_are_known_by_their_class(prior: Any, tmp_path: Path) -> None:
    varify.save(variational(prior={"out.weight": prior}), tmp_path / "a")
    assert type(varify.load(tmp_path / "a", network()).posteriors["out.weight"].prior) is type(prior)

    def nested() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 3), varify.variationalize(nn.Linear(3, 2), prior=prior))

    varify.save(varify.variationalize(nested()), tmp_path / "a")
    found = varify.load(tmp_path / "a", nn.Sequential(nn.Linear(3, 3), varify.variationalize(nn.Linear(3, 2))))
    assert type(found.module[1].posteriors["weight"].prior) is type(prior)


# --- files that somebody else wrote, or that are damaged


def rewritten(path: Path, change: Any, vnet: varify.VariationalModule | None = None) -> None:
    """A file of a network with its settings changed: by a function, or to a text."""
    varify.save(vnet or varify.variationalize(nn.Linear(3, 2)), path)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if isinstance(change, str):
        metadata["settings"] = change
    else:
        settings = json.loads(metadata["settings"])
        change(settings)
        metadata["settings"] = json.dumps(settings)
    save_file(tensors, path, metadata)


def state_with(prior: Any) -> dict[str, Any]:
    state = varify.variationalize(nn.Linear(3, 2)).state_dict()
    state["_extra_state"] = read_extra_state(state["_extra_state"])
    state["_extra_state"]["priors"]["weight"] = prior
    return dict(state)


GAUSSIAN = {"kind": "gaussian", "mean": 0.0, "std": 1.0, "bias_std": None, "centered": False}
MIXTGAUSS = {"kind": "mixtgauss", "sigma_1": 1.0, "sigma_2": 0.1, "pi": 0.5, "n_mc_samples": 1}
HUGE = [10**6, 10**6]
MIXTURE = {
    "class": "MixtureSameFamily",
    "mixture_distribution": {"class": "Categorical", "probs": [2]},
    "component_distribution": {"class": "Normal", "loc": [2], "scale": [2]},
}


def described(description: Any, n_mc_samples: Any = 1) -> dict[str, Any]:
    return {"kind": "distribution", "distribution": description, "n_mc_samples": n_mc_samples}


ODD_PRIORS = {
    "no dict": (3, r"prior of weight is 3, not settings with a kind"),
    "a list": ([1, 2], r"prior of weight is \[1, 2\], not settings"),
    "no kind": ({"mean": 0.0}, "prior of weight is .*, not settings with a kind"),
    "an odd kind": ({"kind": ["gaussian"]}, "prior of weight is .*, not settings with a kind"),
    "unknown kind": ({"kind": "nose"}, "of kind 'nose' for weight; import the module"),
    "missing": ({"kind": "mixtgauss", "sigma_1": 1.0}, "'mixtgauss' of weight: missing a required argument: 'sigma_2'"),
    "unknown": ({**GAUSSIAN, "nose": 1}, "'gaussian' of weight: got an unexpected keyword argument 'nose'"),
    "huge": ({**GAUSSIAN, "mean": HUGE}, r"of weight: mean has shape \(1000000, 1000000\); the parameter has \(2, 3\)"),
    "larger": ({**GAUSSIAN, "std": [5, 2, 3]}, r"of weight: std has shape \(5, 2, 3\); the parameter has \(2, 3\)"),
    "no shape": ({**GAUSSIAN, "std": [2, -3]}, r"of weight: std must be the shape of a tensor, got \[2, -3\]"),
    "half a row": ({**GAUSSIAN, "std": [1.5]}, r"of weight: std must be the shape of a tensor, got \[1\.5\]"),
    "text": ({**GAUSSIAN, "std": "1.0"}, "of weight: std must be a number or a tensor, got '1.0'"),
    "negative": ({**GAUSSIAN, "std": -1.0}, "of weight: std must be positive, got -1.0"),
    "too large a number": ({**GAUSSIAN, "mean": 10**400}, "'gaussian' of weight: "),
    "many draws": (
        {**MIXTGAUSS, "n_mc_samples": 10**12},
        "of weight: n_mc_samples must be at most 100,000",
    ),
    "no draws": ({**MIXTGAUSS, "n_mc_samples": "3"}, "of weight: n_mc_samples must be a positive"),
    "no description": (described(None), "of weight: distribution must be a class of torch.distributions .*, got None"),
    "a function": (
        described({"class": "kl_divergence"}),
        "of weight: distribution must be a class",
    ),
    "builtins": (
        described({"class": "__builtins__"}),
        "of weight: distribution must be a class",
    ),
    "an unknown argument": (
        described({"class": "Normal", "loc": [], "scale": [], "nose": []}),
        "of weight: distribution, of class Normal: got an unexpected keyword argument 'nose'",
    ),
    "a huge distribution": (
        described({"class": "Normal", "loc": [], "scale": HUGE}),
        r"of weight: the distribution has batch shape \(1000000, 1000000\); the parameter has \(2, 3\)",
    ),
    "shapes that don't fit": (
        described({"class": "Normal", "loc": [2, 3], "scale": [3, 2]}),
        r"of weight: distribution: the shapes loc \(2, 3\), scale \(3, 2\) don't fit together",
    ),
    "of vectors": (described({"class": "Dirichlet", "concentration": [3]}), "Dirichlet is of vectors"),
    "a mixture of nothing": (
        described({**MIXTURE, "component_distribution": [2]}),
        "'distribution' of weight: The Component distribution needs? to be an instance",
    ),
    "a mixture within": (
        described({**MIXTURE, "component_distribution": {"class": "Normal", "loc": HUGE, "scale": []}}),
        r"of weight: the distribution has batch shape \(1000000,\)",
    ),
    "without the draws": ({"kind": "distribution", "distribution": MIXTURE}, "of weight: it has the settings distrib"),
}


@pytest.mark.parametrize(("prior", "told"), ODD_PRIORS.values(), ids=ODD_PRIORS.keys())
def test_odd_priors_in_files_are_refused_by_name(
    prior: Any, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vnet = varify.variationalize(nn.Linear(3, 2), init=varify.inits.Normal())
    expected = copy.deepcopy(vnet)
    state = state_with(prior)
    rewritten(tmp_path / "a", lambda settings: settings["extra"].update(_extra_state=state["_extra_state"]))
    for name in ("full", "ones", "empty"):  # what could allocate
        monkeypatch.setattr(torch, name, limited(getattr(torch, name)))
    for load in (lambda: vnet.load_state_dict(state), lambda: vnet.load_state_dict(state, strict=False)):
        with pytest.raises(varify.PriorError, match=told):
            load()
        assert_same(vnet, expected)
    with pytest.raises(varify.PriorError, match=told):
        varify.load(tmp_path / "a", nn.Linear(3, 2))


def limited(make: Any) -> Any:
    def made(*shape: Any, **options: Any) -> Tensor:
        tensor: Tensor = make(*shape, **options)
        assert tensor.is_meta or tensor.numel() < 1000, "allocated before it was checked"
        return tensor

    return made


def test_a_mixture_of_more_components_than_the_file_has_takes_no_memory(tmp_path: Path) -> None:
    """Its tensors have a dimension of their own, so the parameter's shape doesn't bound them: the state does."""
    many = 10**12
    description = {
        **MIXTURE,
        "mixture_distribution": {"class": "Categorical", "probs": [many]},
        "component_distribution": {"class": "Normal", "loc": [many], "scale": [many]},
    }
    vnet = varify.variationalize(nn.Linear(3, 2))
    expected = copy.deepcopy(vnet)
    state = state_with(described(description))
    with pytest.raises(RuntimeError, match=r"prior\.weight\.component_distribution_loc"):
        vnet.load_state_dict(state)
    for name in ("mixture_distribution_probs", "component_distribution_loc", "component_distribution_scale"):
        state[f"prior.weight.{name}"] = torch.full((2,), 0.5)
    with pytest.raises(RuntimeError, match=r"size mismatch for prior\.weight"):
        vnet.load_state_dict(state)
    assert_same(vnet, expected)
    rewritten(tmp_path / "a", lambda s: s["extra"].update(_extra_state=state["_extra_state"]))
    with pytest.raises(varify.StructureError, match=r"prior\.weight\.component_distribution_loc"):
        varify.load(tmp_path / "a", nn.Linear(3, 2))


TENSOR_PRIORS = {
    "gaussian": lambda: varify.priors.Gaussian(torch.randn(2, 3), torch.rand(2, 3) + 0.1),
    "a row": lambda: varify.priors.Gaussian(std=torch.rand(3) + 0.1),
    "double": lambda: varify.priors.Gaussian(std=torch.rand(2, 3, dtype=torch.float64) + 0.1),
    "mixtgauss": lambda: varify.priors.ScaleMixture(1.0, 0.1, torch.rand(2, 3)),
    "laplace": lambda: torch.distributions.Laplace(0.0, torch.rand(2, 1, dtype=torch.float64) + 0.1),
    "student": lambda: torch.distributions.StudentT(torch.rand(3) + 3, 0.0, 0.5),
    "mixture": lambda: torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.rand(2, 3, 4)),
        torch.distributions.Normal(torch.randn(2, 3, 4), torch.rand(2, 3, 4) + 0.1),
    ),
    "one mixture for all": lambda: torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.rand(4)), torch.distributions.Normal(torch.randn(4), torch.rand(4) + 0.1)
    ),
}


@pytest.mark.parametrize("make", TENSOR_PRIORS.values(), ids=TENSOR_PRIORS.keys())
def test_priors_of_tensors_keep_every_digit(make: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vnet = varify.variationalize(nn.Linear(3, 2, bias=False), prior=make())
    varify.save(vnet, tmp_path / "a")
    loaded = varify.load(tmp_path / "a", nn.Linear(3, 2, bias=False))
    assert_same(loaded, vnet)
    for (name, found), (_, expected) in zip(loaded.named_buffers(), vnet.named_buffers(), strict=True):
        assert found.dtype == expected.dtype, name
        found.add_(0)  # its own memory
    other = varify.variationalize(nn.Linear(3, 2, bias=False))
    other.load_state_dict(vnet.state_dict())
    assert_same(other, vnet)


def without(name: str) -> Any:
    return lambda settings: settings.pop(name)


def with_(**values: Any) -> Any:
    return lambda settings: settings.update(values)


def extra(**values: Any) -> Any:
    return lambda settings: settings["extra"]["_extra_state"].update(values)


ODD_SETTINGS = {
    "no json": ("{", r"its settings can't be read \(JSONDecodeError"),
    "deep json": ("[" * 100_000, r"its settings can't be read \(RecursionError"),
    "a list": ("[]", "its settings are a list"),
    "no parameters": (without("parameters"), "its setting 'parameters' is 'None', no list"),
    "parameters of numbers": (with_(parameters=[1]), "its setting 'parameters' has '1', no str"),
    "unknown parameters": (with_(parameters=["weight", "nose"]), "'parameters' has nose without a tensor"),
    "an empty list": (with_(parameters=[]), "'parameters' has none"),
    "versions": (with_(versions={"module": {"version": "two"}}), "'versions' has .* for 'module'"),
    "strict": (with_(strict="yes"), "its setting 'strict' is 'yes', no bool"),
    "same": (with_(same={"module.bias": "nose"}), "'same' and 'extra' have module.bias"),
    "extra": (lambda s: s["extra"].update({"rho.weight": 3}), "'same' and 'extra' have rho.weight"),
    "requires_grad": (with_(requires_grad={"module.weight": "no"}), "'requires_grad' has 'no', no bool"),
    "no priors": (extra(priors=[]), "extra state has no dict of priors"),
    "no estimators": (extra(estimators=None), "extra state has no dict of estimators"),
    "no masks": (extra(fixed="weight"), "extra state has no list of fixed"),
}


@pytest.mark.parametrize(("change", "told"), ODD_SETTINGS.values(), ids=ODD_SETTINGS.keys())
def test_odd_settings_in_files_are_refused_by_name(change: Any, told: str, tmp_path: Path) -> None:
    rewritten(tmp_path / "a", change)
    with pytest.raises(varify.StructureError, match=told):
        varify.load(tmp_path / "a", nn.Linear(3, 2))


@pytest.mark.parametrize("estimator", ["nose", 3, None, ["local"]])
def test_unknown_estimators_in_files_are_refused_by_name(estimator: Any, tmp_path: Path) -> None:
    rewritten(tmp_path / "a", extra(estimators={"weight": estimator, "bias": "local"}))
    with pytest.raises(varify.EstimatorError, match=r"estimator of weight: estimator must be one of .*, got"):
        varify.load(tmp_path / "a", nn.Linear(3, 2))
    vnet = varify.variationalize(nn.Linear(3, 2))
    expected = copy.deepcopy(vnet)
    state = vnet.state_dict()
    state["_extra_state"] = read_extra_state(state["_extra_state"])
    state["_extra_state"]["estimators"] = {"bias": "local", "weight": estimator}
    with pytest.raises(varify.EstimatorError, match="estimator of weight"):
        vnet.load_state_dict(state)
    with pytest.raises(varify.EstimatorError, match="estimator of weight"):
        vnet.set_extra_state(state["_extra_state"])
    assert_same(vnet, expected)


def test_a_prior_whose_tensors_fit_no_parameter_is_not_written(tmp_path: Path) -> None:
    class PerRow(varify.priors.Prior):
        def __init__(self, scale: Tensor) -> None:
            super().__init__()
            self.keep_positive(scale=scale)

        def for_parameter(self, w: Tensor, fan_in: int) -> "PerRow":
            return copy.deepcopy(self)

        def log_prob(self, w: Tensor) -> Tensor:
            return torch.distributions.Normal(0.0, self.scale.unsqueeze(1)).log_prob(w).sum()

    vnet = varify.variationalize(nn.Linear(3, 2), prior={"weight": PerRow(torch.ones(2))})
    told = r"the prior of weight, a PerRow, could not be loaded: scale has shape \(2,\); .* a from_settings of its own"
    with pytest.raises(varify.PriorError, match=told):
        varify.save(vnet, tmp_path / "a")
