"""The user's module: its parameters, copies and views. No posterior, no graph."""
