"""Train, evaluate and explain land-cover models of satellite tiles."""

__version__ = "0.1.0"
