"""Ordinary networks, without a word of varify. Input `(batch, channels, 32, 32)`, output logits `(batch, classes)`."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "softplus": nn.Softplus}


class LeNet(nn.Module):
    """Two convolutions and three dense layers (LeCun et al. 1998)."""

    def __init__(self, classes: int = 10, channels: int = 1, activation: str = "relu") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)
        self.act = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(batch, classes)`."""
        x = F.max_pool2d(self.act(self.conv1(x)), 2)
        x = F.max_pool2d(self.act(self.conv2(x)), 2)
        x = self.act(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc3(self.act(self.fc2(x)))
        return logits


class AlexNet(nn.Module):
    """Five convolutions and a dense layer, of the size that PyTorch-BayesianCNN trains on CIFAR."""

    def __init__(self, classes: int = 10, channels: int = 1, activation: str = "softplus") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 11, stride=4, padding=5)
        self.conv2 = nn.Conv2d(64, 192, 5, padding=2)
        self.conv3 = nn.Conv2d(192, 384, 3, padding=1)
        self.conv4 = nn.Conv2d(384, 256, 3, padding=1)
        self.conv5 = nn.Conv2d(256, 128, 3, padding=1)
        self.fc = nn.Linear(128, classes)
        self.act = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(batch, classes)`."""
        x = F.max_pool2d(self.act(self.conv1(x)), 2)
        x = F.max_pool2d(self.act(self.conv2(x)), 2)
        x = self.act(self.conv4(self.act(self.conv3(x))))
        x = F.max_pool2d(self.act(self.conv5(x)), 2)
        logits: Tensor = self.fc(x.flatten(1))
        return logits


def mlp(classes: int = 10, channels: int = 1, activation: str = "relu", size: int = 32) -> nn.Module:
    """Two hidden layers of 400."""
    act = ACTIVATIONS[activation]
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(channels * size**2, 400), act()),
        *(nn.Linear(400, 400), act(), nn.Linear(400, classes)),
    )


def three_conv(classes: int = 10, channels: int = 1, activation: str = "softplus") -> nn.Module:
    """Three convolutions and three dense layers, as the 3Conv3FC of PyTorch-BayesianCNN."""
    act = ACTIVATIONS[activation]
    return nn.Sequential(
        *(nn.Conv2d(channels, 32, 5, padding=2), act(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(32, 64, 5, padding=2), act(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 128, 5, padding=1), act(), nn.MaxPool2d(3, 2)),
        *(nn.Flatten(), nn.Linear(2 * 2 * 128, 1000), act()),
        *(nn.Linear(1000, 1000), act(), nn.Linear(1000, classes)),
    )


MODELS: dict[str, Callable[..., nn.Module]] = {"lenet": LeNet, "alexnet": AlexNet, "3conv3fc": three_conv, "mlp": mlp}
