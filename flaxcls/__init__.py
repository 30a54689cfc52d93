"""flaxcls: train, evaluate and explain image classifiers with JAX."""

__version__ = "0.1.0"
