"""Losses against PyTorch: values, gradients, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcls import losses
from flaxcls.errors import InputError

NUM_CLASSES = 7
EVERY = np.ones(64, bool)


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    jax.config.update("jax_enable_x64", request.param == "float64")
    yield request.param
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")


def _example(labels, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=3, size=(64, NUM_CLASSES))
    if labels == "soft":
        return logits, rng.dirichlet(np.ones(NUM_CLASSES), 64)
    return logits, rng.integers(0, NUM_CLASSES, 64)


def _torch_reference(torch, logits, labels, weights, smoothing):
    inputs = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    value = torch.nn.functional.cross_entropy(
        inputs,
        torch.tensor(labels),
        weight=None if weights is None else torch.tensor(weights),
        label_smoothing=smoothing,
    )
    value.backward()
    return value.item(), inputs.grad.numpy()


@pytest.mark.parametrize("labels", ["integer", "soft"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_and_its_gradient_equal_pytorch(torch, dtype, labels, smoothing, weighted):
    logits, targets = _example(labels)
    weights = np.linspace(0.2, 3, NUM_CLASSES) if weighted else None
    loss = losses.create_loss("cross_entropy", class_weights=weights, label_smoothing=smoothing)

    def mean(logits):
        value, weight = losses.total(loss(logits, jnp.asarray(targets)), EVERY)
        return value / weight

    value, gradient = jax.value_and_grad(mean)(jnp.asarray(logits, dtype))
    reference, reference_gradient = _torch_reference(torch, logits, targets, weights, smoothing)
    tolerance = 1e-6 if dtype == "float32" else 1e-12
    assert value.dtype == gradient.dtype == dtype
    np.testing.assert_allclose(value, reference, rtol=tolerance)
    np.testing.assert_allclose(gradient, reference_gradient, rtol=0, atol=tolerance / 10)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_each_example_carries_pytorchs_numerator_and_denominator(torch, smoothing):
    logits, labels = _example("integer")
    weights = np.linspace(0.2, 3, NUM_CLASSES)
    loss = losses.create_loss("cross_entropy", class_weights=weights, label_smoothing=smoothing)
    result = loss(jnp.asarray(logits, jnp.float32), jnp.asarray(labels))
    numerator = torch.nn.functional.cross_entropy(
        torch.tensor(logits),
        torch.tensor(labels),
        weight=torch.tensor(weights),
        label_smoothing=smoothing,
        reduction="none",
    )
    np.testing.assert_allclose(result.value * result.weight, numerator, rtol=2e-6)
    np.testing.assert_allclose(result.weight, weights[labels], rtol=1e-6)
    assert result.parts == {}


def test_one_hot_soft_labels_without_weights_equal_integer_labels():
    logits, labels = _example("integer")
    loss = losses.create_loss("cross_entropy", label_smoothing=0.1)
    hard = loss(jnp.asarray(logits), jnp.asarray(labels))
    soft = loss(jnp.asarray(logits), jax.nn.one_hot(labels, NUM_CLASSES))
    np.testing.assert_allclose(hard.value, soft.value, rtol=1e-6)
    np.testing.assert_array_equal(hard.weight, soft.weight)


@pytest.mark.parametrize("labels", [np.array([0, 1]), np.eye(2, 3, dtype=np.float32)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_huge_logits_give_finite_values_and_gradients(labels, smoothing):
    loss = losses.create_loss("cross_entropy", label_smoothing=smoothing)
    logits = jnp.array([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0]])

    def mean(logits):
        return jnp.mean(loss(logits, jnp.asarray(labels)).value)

    value, gradient = jax.value_and_grad(mean)(logits)
    # -log p is 0, 2e4 and 1e4 for the three classes of either example.
    assert value == pytest.approx(1e4 * (1 - smoothing) + smoothing * 1e4)
    assert np.all(np.isfinite(gradient))


def test_low_precision_logits_are_computed_in_float32():
    logits, labels = _example("integer")
    low = jnp.asarray(logits, jnp.bfloat16)
    loss = losses.create_loss("cross_entropy", label_smoothing=0.1)
    result = loss(low, jnp.asarray(labels))
    assert result.value.dtype == result.weight.dtype == jnp.float32
    np.testing.assert_array_equal(result.value, loss(low.astype(jnp.float32), labels).value)


def test_total_leaves_out_masked_rows_even_if_they_are_nan():
    nan = jnp.nan
    loss = losses.Loss(jnp.array([1.0, nan, 3.0, 5.0]), jnp.array([2.0, 1.0, nan, 0.5]), {})
    value, weight = losses.total(loss, jnp.array([True, False, False, True]))
    assert (value, weight) == (4.5, 2.5)


def test_a_batch_split_in_two_has_the_same_totals():
    logits, labels = _example("integer")
    weights = np.linspace(0.2, 3, NUM_CLASSES)
    loss = losses.create_loss("cross_entropy", class_weights=weights)
    whole = losses.total(loss(jnp.asarray(logits), jnp.asarray(labels)), EVERY)
    halves = [
        losses.total(loss(jnp.asarray(logits[part]), jnp.asarray(labels[part])), EVERY[part])
        for part in (slice(0, 20), slice(20, 64))
    ]
    np.testing.assert_allclose(whole, np.sum(halves, axis=0), rtol=1e-6)


def test_class_weights_follow_their_definitions():
    counts = [10, 30, 60]
    assert losses.class_weights("none", counts) is None
    np.testing.assert_allclose(
        losses.class_weights("balanced", counts), [100 / 30, 100 / 90, 100 / 180]
    )
    np.testing.assert_allclose(losses.class_weights("complement", counts), [0.9, 0.7, 0.4])
    np.testing.assert_allclose(losses.class_weights("values", counts, (1, 2, 3)), [1, 2, 3])


def test_balanced_class_weights_are_scikit_learns():
    utils = pytest.importorskip("sklearn.utils")
    labels = np.repeat([0, 1, 2], [5, 17, 40])
    reference = utils.compute_class_weight("balanced", classes=np.arange(3), y=labels)
    np.testing.assert_allclose(losses.class_weights("balanced", [5, 17, 40]), reference)


@pytest.mark.parametrize(
    ("kind", "counts", "values", "message"),
    [
        ("balance", [1, 2], (), "did you mean 'balanced'"),
        ("balanced", [1, 0], (), "class 1, which has no training example"),
        ("values", [1, 2], (1.0,), "1 numbers for 2 classes"),
        ("values", [1, 2], (1.0, 0.0), "greater than 0"),
        ("values", [1, 2], (1.0, float("nan")), "must be finite"),
        ("balanced", [1, 2], (1.0, 2.0), "set loss.class_weights to 'values'"),
    ],
)
def test_impossible_class_weights_are_refused(kind, counts, values, message):
    with pytest.raises(InputError, match=message):
        losses.class_weights(kind, counts, values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, r"not in \[0, 1\)"),
        ({"label_smoothing": float("nan")}, r"not in \[0, 1\)"),
        ({"label_smothing": 0.1}, "did you mean 'label_smoothing'"),
        ({"class_weights": [1.0, -1.0]}, "none below 0"),
        ({"class_weights": [1.0, float("inf")]}, "finite"),
        ({"class_weights": [0.0, 0.0]}, "all are 0"),
        ({"class_weights": [1.0, 0.0], "label_smoothing": 0.1}, "class 1 has weight 0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        losses.create_loss("cross_entropy", **options)


def test_an_unknown_loss_is_refused_with_the_nearest_name():
    with pytest.raises(InputError, match="did you mean 'cross_entropy'"):
        losses.create_loss("crossentropy")


def test_class_weights_of_the_wrong_length_are_refused():
    loss = losses.create_loss("cross_entropy", class_weights=[1.0, 2.0])
    with pytest.raises(InputError, match="2 weights for 3 classes"):
        loss(jnp.zeros((4, 3)), jnp.zeros(4, jnp.int32))
