"""A config turned into everything that a run is made of."""

from flaxcls.experiment.build import (
    Experiment,
    for_evaluation,
    for_training,
    imported_weights,
    read_dataset,
    untrained_model,
)
from flaxcls.experiment.placement import Data, image_spec, stored_images

__all__ = [
    "Data",
    "Experiment",
    "for_evaluation",
    "for_training",
    "image_spec",
    "imported_weights",
    "read_dataset",
    "stored_images",
    "untrained_model",
]
