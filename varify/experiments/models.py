"""The networks of the command line: ordinary ones, without a word of varify. Input `(batch, 1, 32, 32)`."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class LeNet(nn.Module):
    """Two convolutions and three dense layers (LeCun et al. 1998)."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(batch, classes)`."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc3(F.relu(self.fc2(x)))
        return logits


def mlp(classes: int = 10) -> nn.Module:
    """Two hidden layers of 400."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(1024, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, classes)
    )


def three_conv(classes: int = 10) -> nn.Module:
    """Three convolutions and three dense layers, as the 3Conv3FC of PyTorch-BayesianCNN."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 5, padding=2), nn.Softplus(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(32, 64, 5, padding=2), nn.Softplus(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 128, 5, padding=1), nn.Softplus(), nn.MaxPool2d(3, 2)),
        *(nn.Flatten(), nn.Linear(2 * 2 * 128, 1000), nn.Softplus()),
        *(nn.Linear(1000, 1000), nn.Softplus(), nn.Linear(1000, classes)),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"lenet": LeNet, "mlp": mlp, "3conv3fc": three_conv}
