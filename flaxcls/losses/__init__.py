"""Losses: each gives one value and one weight an example; `total` reduces them.

To add a loss, write a function whose keyword arguments are its options and which returns
`(logits, labels) -> Loss`, and enter it in `LOSSES` of registry.py.
"""

from flaxcls.losses.loss import Loss, LossFunction, total
from flaxcls.losses.registry import LOSSES, create_loss, parts_of
from flaxcls.losses.weights import CLASS_WEIGHTS, class_weights

__all__ = [
    "CLASS_WEIGHTS",
    "LOSSES",
    "Loss",
    "LossFunction",
    "class_weights",
    "create_loss",
    "parts_of",
    "total",
]
