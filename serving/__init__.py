"""The model in production."""
