"""Data sets and networks of the command line, and its schedules and recipes."""

import builtins
import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from varify.experiments.cli import run
from varify.experiments.data import DATA, Images, digits, letters, load_data, load_other
from varify.experiments.data.augmentation import augmented
from varify.experiments.errors import DataError
from varify.experiments.models import MODELS, build
from varify.experiments.settings import Settings
from varify.experiments.spelling import schedule
from varify.experiments.training import Training
from varify.experiments.training.plans import Plan


def random_images(n: int, channels: int, classes: int = 10, size: int = 32) -> Images:
    x, y = torch.rand(n, channels, size, size), torch.arange(n) % classes
    return Images.of((x, y), (x, y), tuple(map(str, range(classes))), size)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("activation", [None, "relu", "softplus"])
def test_every_model_takes_the_images(model: str, activation: str | None) -> None:
    assert MODELS[model]()(torch.zeros(2, 1, 32, 32)).shape == (2, 10)
    network = build(model, activation, random_images(8, 3, 4))
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 4)
    kinds = {type(m).__name__ for m in network.modules()} & {"ReLU", "Softplus"}
    assert len(kinds) == 1
    assert activation is None or kinds == {"ReLU" if activation == "relu" else "Softplus"}


def test_the_sizes_are_those_of_the_original_networks() -> None:
    """Weights of PyTorch-BayesianCNN's, counted by hand for three channels and ten classes."""
    alexnet = [(3, 64, 11), (64, 192, 5), (192, 384, 3), (384, 256, 3), (256, 128, 3)]
    expected = sum(i * o * k * k + o for i, o, k in alexnet) + 128 * 10 + 10
    assert sum(p.numel() for p in MODELS["alexnet"](channels=3).parameters()) == expected
    conv = sum(i * o * 25 + o for i, o in ((3, 32), (32, 64), (64, 128)))
    dense = sum(i * o + o for i, o in ((2 * 2 * 128, 1000), (1000, 1000), (1000, 10)))
    assert sum(p.numel() for p in MODELS["3conv3fc"](channels=3).parameters()) == conv + dense


def test_digits_and_letters() -> None:
    images = digits(Path())
    assert len(images.train) + len(images.test) == 1797
    assert images.train.mean().abs() < 1e-5
    assert abs(images.train.std() - 1) < 1e-5
    assert letters(28).shape[1:] == (28, 28)
    assert len(letters(28).flatten(1).unique(dim=0)) > 80  # they are not all the same box
    other = load_other("letters", images, Path())
    assert other.shape[1:] == (1, 32, 32)
    assert other.min() == pytest.approx(images.train.min().item(), abs=1e-5)  # both are black somewhere


def write_idx(folder: Path, classes: int = 3, compress: bool = False) -> np.ndarray:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for prefix, n in (("train", 12), ("t10k", 6)):
        x, y = generator.integers(0, 256, (n, 28, 28), dtype=np.uint8), np.arange(n, dtype=np.uint8) % classes
        for name, magic, values in (("images-idx3", 0x803, x), ("labels-idx1", 0x801, y)):
            content = struct.pack(f">I{values.ndim}I", magic, *values.shape) + values.tobytes()
            path = folder / f"{prefix}-{name}-ubyte{'.gz' if compress else ''}"
            path.write_bytes(gzip.compress(content) if compress else content)
    return x


@pytest.mark.parametrize("compress", [False, True])
def test_idx_files_are_read_as_torchvision_reads_them(compress: bool, tmp_path: Path) -> None:
    last = write_idx(tmp_path / "MNIST" / "raw", compress=compress)
    images = load_data(str(tmp_path / "MNIST"), Path(), size=28)
    assert (len(images.train), len(images.test), len(images.classes)) == (12, 6, 3)
    np.testing.assert_allclose(images.test * images.std + images.mean, last[:, None] / 255.0, atol=1e-6)
    if not compress:
        named = load_data("mnist", tmp_path, size=28)
        assert torch.equal(named.test, images.test)
        assert torch.equal(named.train_labels, images.train_labels)
    cut = next((tmp_path / "MNIST" / "raw").glob("train-images*"))
    cut.write_bytes(gzip.compress(b"\0\0\x08\x03abc") if compress else cut.read_bytes()[:-1])
    with pytest.raises(DataError, match="is cut; download it again"):
        load_data(str(tmp_path / "MNIST"), Path())


def test_split_mnist_has_five_classes_each(tmp_path: Path) -> None:
    write_idx(tmp_path / "MNIST" / "raw", classes=10)
    halves = [load_data(f"split-mnist-{i}", tmp_path) for i in (1, 2)]
    whole = load_data("mnist", tmp_path)
    assert [half.classes for half in halves] == [whole.classes[:5], whole.classes[5:]]
    assert sum(len(half.train) for half in halves) == len(whole.train)
    assert all(set(half.train_labels.tolist()) <= set(range(5)) for half in halves)


def write_folder(path: Path, classes: tuple[str, ...], n: int = 5, mode: str = "RGB") -> None:
    generator = np.random.default_rng(0)
    for i, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for j in range(n):
            pixels = np.full((20, 24, 3), 40 * i + 30, np.uint8) + generator.integers(0, 9, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(path / name / f"{j}.png")


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_folder_of_images(mode: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_folder(tmp_path / "one", ("ape", "bee", "cat"), mode=mode)
    (tmp_path / "one" / "ape" / "broken.png").write_bytes(b"no image")
    images = load_data(str(tmp_path / "one"), Path())
    assert "1 of 16 files can't be read" in capsys.readouterr().err
    assert images.classes == ("ape", "bee", "cat")
    assert images.channels == len(mode)
    assert (len(images.train), len(images.test)) == (12, 3)
    brightness = [(images.train[images.train_labels == c] * images.std + images.mean).mean().item() for c in range(3)]
    assert brightness == pytest.approx([(40 * i + 34) / 255 for i in range(3)], abs=0.01)
    write_folder(tmp_path / "two" / "train", ("ape", "bee"), mode=mode)
    write_folder(tmp_path / "two" / "val", ("ape", "bee"), n=2, mode=mode)
    assert len(load_data(str(tmp_path / "two"), Path()).test) == 4
    gray = digits(Path())
    assert load_other(str(tmp_path / "two"), gray, Path()).shape == (14, 1, 32, 32)
    assert load_other("digits", images, Path()).shape[1:] == (len(mode), 32, 32)
    (tmp_path / "two" / "val" / "bee").rename(tmp_path / "two" / "val" / "cow")
    with pytest.raises(DataError, match="must have the same classes; bee, cow differ"):
        load_data(str(tmp_path / "two"), Path())
    with pytest.raises(DataError, match="images in folders of at least two classes; wanted: train/CLASS"):
        load_data(str(tmp_path), Path())


def test_images_of_16_bits_are_not_blank_and_those_without_a_white_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    ramp = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64
    for name in ("ape", "bee"):
        (tmp_path / name).mkdir()
        for j in range(5):
            Image.fromarray(ramp).save(tmp_path / name / f"{j}.png")
    Image.fromarray(np.full((32, 32), 7.5, np.float32)).save(tmp_path / "ape" / "9.tif")
    images = load_data(str(tmp_path), Path())
    assert "1 of 11 files can't be read, such as" in (said := capsys.readouterr().err)
    assert "mode F, of which nothing says what is white" in said
    assert images.channels == 1
    expected = torch.tensor(ramp.astype(float) / 65535).float()
    assert torch.allclose(images.train[0, 0] * images.std.flatten() + images.mean.flatten(), expected, atol=1e-5)


def test_a_run_on_a_folder_with_another_for_its_ood(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", ("ape", "bee", "cat"), n=10)
    write_folder(tmp_path / "other", ("x",), n=3)
    options = ["--epochs", "1", "--n-samples", "2", "--quiet", "--ood", str(tmp_path / "other"), "--model", "alexnet"]
    assert run(["train", "--data", str(tmp_path / "data"), *options, "--out", str(tmp_path / "run")]) == 0
    assert run(["uncertainty", str(tmp_path / "run"), "--inputs", "1"]) == 0
    assert (tmp_path / "run" / "uncertainty-other.png").exists()


def test_augmentation_changes_what_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 2, 32, 32, generator=generator)
    assert torch.allclose(augmented(x, [], generator), x, atol=1e-4)
    flipped = augmented(x, ["flip"], generator)
    same = (flipped - x).abs().amax((1, 2, 3)) < 1e-4
    mirrored = (flipped - x.flip(-1)).abs().amax((1, 2, 3)) < 1e-4
    assert (same ^ mirrored).all()
    assert 60 < int(mirrored.sum()) < 140  # 200 tosses: false alarm below 1 in 10⁷
    point = torch.zeros(100, 1, 33, 33)
    point[:, :, 16, 16] = 1
    shifted = augmented(point, ["shift"], generator)
    where = torch.stack([(shifted.sum(d) * torch.arange(33)).sum(-1) / shifted.sum((1, 2, 3))[:, None] for d in (2, 3)])
    moved = (where.squeeze() - 16).abs()
    assert moved.max() <= 33 / 8 + 1e-3
    assert moved.max() > 33 / 8 * 0.8
    turned = augmented(point, ["rotate"], generator)
    assert turned[:, 0, 16, 16] == pytest.approx(torch.ones(100), abs=1e-3)  # the center stays
    edge = torch.zeros(100, 1, 33, 33)
    edge[:, :, 16, 32] = 1
    rows = (augmented(edge, ["rotate"], generator).sum(3).squeeze(1) * torch.arange(33)).sum(1)
    height = rows / augmented(edge, [], generator).sum((1, 2, 3)).clamp_min(1e-9) - 16
    assert 1 < height.abs().max() <= 16 * np.sin(np.radians(10)) + 1


def test_validation_images_are_neither_trained_on_nor_augmented() -> None:
    images = digits(Path())
    training = Training(Settings(validation=0.25, augment="flip", networks="plain", batch_size=1000), images)
    assert training.num_data == round(0.75 * 1348)
    trained = {tuple(x.flatten().tolist()) for x in training.training_set()[0]}
    held_out = images.train[training._validation]
    assert not trained & {tuple(x.flatten().tolist()) for x in held_out}
    assert len(held_out) + training.num_data == 1348
    seen: list[torch.Tensor] = []
    network = training.learners["plain"].network
    network.register_forward_pre_hook(lambda m, x: None if m.training else seen.append(x[0].clone()))
    training.train_epoch(lambda figures: None)
    assert torch.equal(torch.cat(seen), held_out)


def test_both_networks_see_the_same_batches_whichever_are_trained() -> None:
    images = digits(Path())
    orders = []
    for networks in ("both", "plain", "variational"):
        training = Training(Settings(networks=networks, batch_size=500), images)
        list(training.batches())
        orders.append(torch.cat([y for _, y in training.batches()]))
    assert torch.equal(orders[0], orders[1])
    assert torch.equal(orders[0], orders[2])
    assert [len(part) for part in training._split(torch.arange(1001))] == [500, 501]  # none has one image


def test_schedules_of_the_kl() -> None:
    warm = schedule("warm-up:0.5", 100, 10)
    assert [warm(i) for i in (0, 25, 50, 99)] == [0, 0.5, 1, 1]
    cyclical = schedule("cyclical:2", 100, 10)
    assert [cyclical(i) for i in (0, 25, 49, 50)] == [0, 1, 1, 0]
    blundell = schedule("blundell", 100, 10)
    assert [blundell(i) for i in (0, 9)] == pytest.approx([10 * 2**9 / (2**10 - 1), 10 / (2**10 - 1)])
    assert schedule("constant", 100, 10)(3) == 1


def test_the_weight_of_the_kl_is_beta_times_the_schedule() -> None:
    images = digits(Path())
    training = Training(Settings(networks="variational", beta="0.5", kl_schedule="warm-up:1", epochs=2), images)
    assert training.learners["variational"].elbo.beta == 0
    x, y = next(training.batches())
    training.learners["variational"].step(x, y)
    assert training.learners["variational"].elbo.beta == pytest.approx(0.5 / (2 * training.num_batches))


def test_all_named_data_say_how_to_get_them(tmp_path: Path) -> None:
    for name in DATA.keys() - {"digits"}:
        with pytest.raises(DataError, match=f"is not in {tmp_path}: add --download, or give --data-root"):
            load_data(name, tmp_path)


@pytest.mark.parametrize("plan", ["cosine", "constant"])
def test_a_lengthened_training_has_the_longer_plans_rates(plan: str) -> None:
    def rates(epochs: int, states: tuple | None = None, n: int = 0) -> tuple[list[float], tuple]:
        optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], 0.3)
        made = Plan(optimizer, Settings(lr_plan=plan, epochs=epochs))
        if states:
            optimizer.load_state_dict(states[0])
            made.load_state_dict(states[1])
        found = []
        for _ in range(n):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            made.step(0.0)
        return found, (optimizer.state_dict(), made.state_dict())

    _, states = rates(6, n=6)
    later, _ = rates(12, states, n=6)
    whole, _ = rates(12, n=12)
    assert later == pytest.approx(whole[6:])
    if plan == "cosine":
        assert later[0] == pytest.approx(0.3 * 0.501)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ModuleNotFoundError("no such module", name="torchvision"), "torchvision, which is not installed: pip install"),
        (
            RuntimeError("operator torchvision::nms does not exist"),
            "nms does not exist.: install one built for torch 2",
        ),
    ],
    ids=["not installed", "built for another torch"],
)
def test_why_torchvision_is_not_there(error: Exception, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, *args: object) -> object:
        if name == "torchvision":
            raise error
        return real(name, *args)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DataError, match=told):
        load_data("mnist", Path("/nowhere"))
