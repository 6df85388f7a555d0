"""The installed wheel, away from the checkout: convert, train a step, predict, and read the state back."""

import importlib.metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import varify

package = Path(varify.__file__).parent
assert package.parent.name == "site-packages", package
assert (package / "py.typed").exists()
assert importlib.metadata.version("torch-varify") == varify.__version__

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
x, y = torch.randn(20, 4), torch.randint(3, (20,))
vnet = varify.variationalize(net)
elbo = varify.ELBO(num_data=len(x))
optimizer = torch.optim.Adam(varify.parameter_groups(vnet, lr=1e-2))
losses = []
for _ in range(100):
    optimizer.zero_grad()
    loss = elbo(vnet, F.cross_entropy, x, y).loss
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert sum(losses[-10:]) < 0.8 * sum(losses[:10]), losses
prediction = vnet.predict(x, n_samples=16, seed=0)
assert prediction.samples.shape == (16, 20, 3)
again = varify.variationalize(net)
again.load_state_dict(vnet.state_dict())
assert torch.equal(again.predict(x, n_samples=16, seed=0).samples, prediction.samples)
print(f"torch-varify {varify.__version__} from {package}")
