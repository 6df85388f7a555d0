"""Real architectures, and what must hold for each: `python -m tests.zoo` writes the table in tests/zoo/README.md."""

from tests.zoo import own_networks, peft_models, timm_models, torch_layers, torchvision_models, transformers_models

GROUPS = {
    "torchvision": torchvision_models,
    "timm": timm_models,
    "transformers": transformers_models,
    "peft": peft_models,
    "torch.nn": torch_layers,
    "ways of writing a network": own_networks,
}
