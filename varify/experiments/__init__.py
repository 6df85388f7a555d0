"""The command line and what it needs: models, data, training, metrics, pictures. Uses varify's public names only."""
