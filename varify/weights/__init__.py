"""One weight: posterior, prior and divergence of a parameter tensor. No network, no graph."""
