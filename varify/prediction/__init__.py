"""What many draws of the weights say together."""
