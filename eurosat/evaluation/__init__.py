"""How good a trained network is, and why it answers as it does."""
