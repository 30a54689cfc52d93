"""Weights from PyTorch's files, the hub and our own runs, and back."""

from flaxcls.pretrained.layouts import IMAGENET
from flaxcls.pretrained.weights import Normalization, Origin, Report, load, save

__all__ = ["IMAGENET", "Normalization", "Origin", "Report", "load", "save"]
