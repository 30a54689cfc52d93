"""Weights from PyTorch's files, the hub and our own runs, and back."""

from flaxcls.pretrained.weights import Report, load, save

__all__ = ["Report", "load", "save"]
