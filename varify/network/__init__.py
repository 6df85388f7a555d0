"""The user's module: its parameters, copies and views. Knows neither posteriors nor graphs."""
