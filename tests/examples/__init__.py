"""Worked examples: `python -m tests.examples.with_lightning`, `python -m tests.examples.with_transformers`."""
