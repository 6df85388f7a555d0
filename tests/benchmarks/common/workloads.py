"""Networks with a batch and a loss, from an MLP to transformers; all weights are random."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import operators

operators.declare()  # timm and transformers import torchvision, which may not be built for this torch
NUM_DATA = 60_000


@dataclass
class Workload:
    """A network, the arguments of a call, and the loss of its output.

    Attributes:
        network: new.
        inputs: positional arguments.
        targets: class indices.
    """

    network: nn.Module
    inputs: tuple[Tensor, ...]
    targets: Tensor

    def criterion(self, output: Any, targets: Tensor) -> Tensor:
        """Mean cross entropy of the logits, which transformers' networks return by name."""
        logits = getattr(output, "logits", output)
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))

    def to(self, device: torch.device) -> "Workload":
        """The same on a device."""
        return Workload(self.network.to(device), tuple(x.to(device) for x in self.inputs), self.targets.to(device))


class LeNet(nn.Sequential):
    """LeNet-5, of 61,706 weights."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
        )


class Encoder(nn.Module):
    """Four layers of torch's transformer encoder over tokens, with a class for each: 3.4 million weights."""

    def __init__(self, vocabulary: int = 1000, width: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `(batch, length, 10)`."""
        logits: Tensor = self.head(self.encoder(self.embedding(tokens)))
        return logits


def _mlp() -> Workload:
    network = nn.Sequential(nn.Linear(784, 1200), nn.ReLU(), nn.Linear(1200, 1200), nn.ReLU(), nn.Linear(1200, 10))
    return Workload(network, (torch.randn(128, 784),), torch.randint(10, (128,)))


def _lenet() -> Workload:
    return Workload(LeNet(), (torch.randn(128, 1, 28, 28),), torch.randint(10, (128,)))


def _resnet18() -> Workload:
    from tests import operators

    operators.declare()  # which a torchvision for other builds of torch needs
    import torchvision

    network = torchvision.models.resnet18(num_classes=10)
    network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return Workload(network, (torch.randn(32, 3, 32, 32),), torch.randint(10, (32,)))


def _encoder() -> Workload:
    return Workload(Encoder(), (torch.randint(1000, (16, 64)),), torch.randint(10, (16, 64)))


def _timm(name: str, batch: int) -> Workload:
    from tests import operators

    operators.declare()
    import timm

    settings = {"img_size": 96} if "vit" in name else {}
    network = timm.create_model(name, pretrained=False, num_classes=10, **settings)
    return Workload(network, (torch.randn(batch, 3, 96, 96),), torch.randint(10, (batch,)))


def _bert() -> Workload:
    import transformers

    config = transformers.BertConfig(
        vocab_size=8000, hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=1024
    )
    network = transformers.BertForSequenceClassification(config)
    return Workload(network, (torch.randint(8000, (16, 64)),), torch.randint(2, (16,)))


def gpt2(width: int, layers: int, vocabulary: int, batch: int, length: int) -> Workload:
    """A GPT-2 of transformers; width 768, 12 layers and 50,257 tokens make that of 124 million weights."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=max(1, width // 64), use_cache=False
    )
    network = transformers.GPT2LMHeadModel(config)
    tokens = torch.randint(vocabulary, (batch, length))
    return Workload(network, (tokens,), torch.randint(vocabulary, (batch, length)))


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "mlp": _mlp,
    "lenet": _lenet,
    "resnet18": _resnet18,
    "encoder": _encoder,
    "mobilenetv3": lambda: _timm("mobilenetv3_small_100", 8),
    "resnet50": lambda: _timm("resnet50", 4),
    "vit_tiny": lambda: _timm("vit_tiny_patch16_224", 8),
    "bert": _bert,
    "gpt2": lambda: gpt2(384, 6, 8000, 8, 64),
}


def workload(name: str, device: torch.device) -> Workload:
    """A new one, always with the same numbers.

    Raises:
        ImportError: the library that it comes from is not installed.
    """
    torch.manual_seed(0)
    return WORKLOADS[name]().to(device)
