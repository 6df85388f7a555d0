"""Networks as users of the command line write them: `varify train --model tests.factories:NAME`."""

from torch import Tensor, nn


def fits(classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(1024), nn.Linear(1024, classes))


def seven() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(1024, 7))


def nothing() -> None:
    return None


def raises() -> nn.Module:
    return nn.Linear(1 // 0, 1)


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (1 // 0)


def fails_later() -> nn.Module:
    return Fails()
