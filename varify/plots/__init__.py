"""Pictures of posteriors and predictions; each function draws into a matplotlib axis, its own or yours, and returns it.

They need matplotlib: `pip install "torch-varify[plots]"`.
"""

from varify.plots.calibration import reliability
from varify.plots.posteriors import posterior, snr
from varify.plots.pruning import pruning_curve
from varify.plots.regression import intervals
from varify.plots.uncertainties import uncertainty

__all__ = ["intervals", "posterior", "pruning_curve", "reliability", "snr", "uncertainty"]
