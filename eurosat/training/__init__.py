"""Train a network on the train fold."""
