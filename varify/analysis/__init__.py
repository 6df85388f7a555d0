"""What can be done with a trained variational network."""
