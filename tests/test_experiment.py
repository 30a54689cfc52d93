"""What an experiment builds of its config: the loss with its options, and room for its parts."""

import dataclasses

import jax
import numpy as np
import pytest
from small_experiments import lenet

from flaxcls import losses
from flaxcls.data.decode import RESAMPLER
from flaxcls.errors import InputError
from flaxcls.experiment import for_evaluation, for_training


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cross_entropy", {"label_smoothing": 0.2}),
        ("focal", {"form": "sigmoid", "alpha": (0.25,), "gamma": 0.5}),
        ("kl_divergence", {"label_smoothing": 0.2, "kl_reduction": "mean"}),
        ("mse", {"activation": "softmax"}),
        ("multi_margin", {"margin": 0.5, "p": 2}),
    ],
)
def test_the_loss_of_the_config_is_that_of_the_recipe(name, options):
    keys = {f"loss__{key}": value for key, value in options.items()}
    experiment = for_training(
        lenet(loss__name=name, loss__class_weights="effective_number", loss__beta=0.9, **keys)
    )
    counts = np.bincount(experiment.data.dataset.splits["train"].labels)
    weights = losses.class_weights("effective_number", counts, beta=0.9)
    assert len(set(weights)) > 1
    rng = np.random.default_rng(0)
    batch = rng.normal(size=(20, 10)).astype(np.float32), np.arange(20) % 10
    expected = losses.create_loss(name, **options, class_weights=weights)(*batch)
    plain = losses.create_loss(name)(*batch)
    loss = experiment.recipe.loss(*batch)
    jax.tree.map(np.testing.assert_array_equal, loss, expected)
    assert np.all(loss.value * loss.weight != plain.value)


def test_metrics_have_room_for_the_parts_of_the_loss():
    experiment = for_training(lenet())
    assert not experiment.empty_metrics().parts
    config = experiment.config.copy_and_resolve_references().unlock()
    config.loss.name = "hierarchical"
    experiment = dataclasses.replace(experiment, config=config)
    assert tuple(experiment.empty_metrics().parts) == ("child", "parent", "kl")


def test_a_hierarchical_loss_without_parents_is_refused():
    with pytest.raises(InputError, match="needs the parent of each class; write rules"):
        for_training(lenet(loss__name="hierarchical"))


@pytest.mark.parametrize(
    ("size", "before", "said"),
    [(6, "another", True), (6, RESAMPLER, False), (8, "another", False), (16, "another", False)],
)
def test_another_resampler_than_the_run_began_with_is_said(size, before, said):
    """Digits are 8x8: they are resized on the host where a model wants fewer pixels."""
    config = lenet(model__name="resnet18", data__image_size=size)
    begun = for_training(config)
    described = {
        "fingerprint": begun.data.fingerprint,
        "placement": "host",
        "mean": [0.5],
        "std": [0.5],
        "weights": None,
        "class_names": begun.data.dataset.class_names,
        "class_counts": [9] * 10,
        "resampler": before,
    }
    for experiment in (for_training(config, described), for_evaluation(config, described)):
        notes = [n for n in experiment.data.notes if "did when the run began" in n]
        assert len(notes) == said
        assert not said or notes[0].startswith(f"data: {RESAMPLER} resizes the images here, and")
