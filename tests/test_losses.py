"""Losses against PyTorch or their formula: values, gradients, and what is refused."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcls import losses
from flaxcls.errors import InputError

NUM_CLASSES = 7
EVERY = np.ones(64, bool)
PARENTS = (0, 1, 1, 0, 2, 1, 0)

# Every loss, its forms included.
CASES = [
    ("cross_entropy", {"label_smoothing": 0.1}),
    ("focal", {"alpha": (0.25,), "gamma": 0.5}),
    ("focal", {"form": "sigmoid", "gamma": 0.5}),
    ("kl_divergence", {"label_smoothing": 0.1}),
    ("kl_divergence", {"kl_reduction": "mean"}),
    ("mse", {}),
    ("mse", {"activation": "softmax"}),
    ("multi_margin", {}),
    ("multi_margin", {"p": 2}),
    ("hierarchical", {"parents": PARENTS, "label_smoothing": 0.1}),
]
FLAT_CASES = [case for case in CASES if case[0] != "hierarchical"]


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    jax.config.update("jax_enable_x64", request.param == "float64")
    yield request.param
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
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


def _batch_of(name, dtype="float32"):
    """Logits and integer labels as the loss `name` takes them."""
    logits, labels = _example("integer")
    if name != "hierarchical":
        return jnp.asarray(logits, dtype), jnp.asarray(labels)
    parent_logits = jnp.asarray(logits[:, :3] - logits[:, 3:6], dtype)
    pairs = np.stack([labels, np.take(PARENTS, labels)], axis=1)
    return (jnp.asarray(logits, dtype), parent_logits), jnp.asarray(pairs)


def _mean_and_gradient(loss, logits, labels):
    """The batch's loss and its gradient, of the logits or the tuple of them."""

    def mean(logits):
        result = loss(logits, jnp.asarray(labels))
        value, weight = losses.total(result, np.ones(len(labels), bool))
        return value / weight

    return jax.value_and_grad(mean)(logits)


def _assert_equals_pytorch(torch, loss, logits, labels, reference):
    """Compares with `reference`, a function of float64 logits in PyTorch, to 12 digits."""
    inputs = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    expected = reference(inputs)
    expected.backward()
    value, gradient = _mean_and_gradient(loss, jnp.asarray(logits, jnp.float64), labels)
    assert value.dtype == gradient.dtype == jnp.float64
    np.testing.assert_allclose(value, expected.item(), rtol=1e-12)
    np.testing.assert_allclose(gradient, inputs.grad.numpy(), rtol=1e-11, atol=1e-14)


def _expected_over_labels(torch, labels, per_label):
    """sum_k y[k] per_label(k), for soft labels (N, C), averaged over the batch."""
    shares = torch.tensor(labels)
    ones = torch.ones(len(labels), dtype=torch.int64)
    return sum(shares[:, k] * per_label(k * ones) for k in range(NUM_CLASSES)).mean()


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


@pytest.mark.parametrize("labels", ["integer", "soft"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("alpha", [(), (0.25,), tuple(np.linspace(0.1, 0.9, NUM_CLASSES))])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_of_softmax_follows_its_formula(torch, x64, labels, weighted, alpha, gamma):
    logits, targets = _example(labels)
    weights = np.linspace(0.2, 3, NUM_CLASSES) if weighted else np.ones(NUM_CLASSES)
    loss = losses.create_loss("focal", alpha=alpha, gamma=gamma, class_weights=weights)
    factor = torch.tensor(np.broadcast_to(alpha or 1.0, NUM_CLASSES).copy())

    def per_label(inputs, y):
        log_p = torch.log_softmax(inputs, 1).gather(1, y[:, None])[:, 0]
        return torch.tensor(weights)[y] * factor[y] * (1 - log_p.exp()) ** gamma * -log_p

    def reference(inputs):
        if labels == "soft":
            return _expected_over_labels(torch, targets, lambda y: per_label(inputs, y))
        return per_label(inputs, torch.tensor(targets)).sum() / weights[targets].sum()

    _assert_equals_pytorch(torch, loss, logits, targets, reference)


@pytest.mark.parametrize("labels", ["integer", "soft"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("alpha", [(), (0.25,), tuple(np.linspace(0.1, 0.9, NUM_CLASSES))])
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_loss_of_sigmoids_follows_its_formula(torch, x64, labels, weighted, alpha, gamma):
    logits, targets = _example(labels)
    weights = np.linspace(0.2, 3, NUM_CLASSES) if weighted else np.ones(NUM_CLASSES)
    options = {"alpha": alpha, "gamma": gamma, "class_weights": weights}
    loss = losses.create_loss("focal", form="sigmoid", **options)
    factor = torch.tensor(np.broadcast_to(alpha or 1.0, NUM_CLASSES).copy())

    def per_label(inputs, y):
        one_hot = torch.nn.functional.one_hot(y, NUM_CLASSES).double()
        bce = torch.nn.functional.binary_cross_entropy_with_logits(
            inputs, one_hot, reduction="none"
        )
        pt = torch.exp(-bce)
        return torch.tensor(weights)[y] * (factor * (1 - pt) ** gamma * bce).sum(1)

    def reference(inputs):
        if labels == "soft":
            return _expected_over_labels(torch, targets, lambda y: per_label(inputs, y))
        return per_label(inputs, torch.tensor(targets)).sum() / weights[targets].sum()

    _assert_equals_pytorch(torch, loss, logits, targets, reference)


@pytest.mark.parametrize("labels", ["integer", "soft"])
@pytest.mark.parametrize("weighted", [False, True])
def test_focal_loss_that_does_not_focus_is_cross_entropy(labels, weighted):
    logits, targets = _example(labels)
    weights = np.linspace(0.2, 3, NUM_CLASSES) if weighted else None
    batch = jnp.asarray(logits), jnp.asarray(targets)
    focal = losses.create_loss("focal", gamma=0.0, class_weights=weights)(*batch)
    plain = losses.create_loss("cross_entropy", class_weights=weights)(*batch)
    np.testing.assert_allclose(focal.value, plain.value, rtol=1e-6)
    np.testing.assert_array_equal(focal.weight, plain.weight)


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_the_gradient_of_focal_loss_is_right_from_no_to_full_confidence(form, gamma):
    """In float32, where 1 - p becomes 0 beyond a logit of 17, and p itself 0 below -104."""
    d = np.array([0.0, -1e-3, 1e-3, -1.0, 1.0, -8, 8, 15, -20, 20, -87, 87, 95, -110, 110, 1e4])
    # One logit d against 0 in the softmax form; the other class has no term that depends on d.
    logits = np.stack([d, np.zeros_like(d)], axis=1)
    loss = losses.create_loss("focal", form=form, gamma=gamma)

    def total(logits):
        return jnp.sum(loss(logits, jnp.zeros(len(d), jnp.int32)).value)

    gradient = jax.grad(total)(jnp.asarray(logits, jnp.float32))[:, 0]
    nll = np.logaddexp(0, -d)
    miss = -np.expm1(-nll)  # 1 - p
    expected = -(miss ** (gamma + 1)) - gamma * nll * miss**gamma * (1 - miss)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize("reduction", ["batchmean", "mean"])
@pytest.mark.parametrize("labels", ["integer", "soft", "one-hot"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_kl_divergence_equals_pytorch(torch, x64, reduction, labels, smoothing):
    logits, targets = _example("soft" if labels == "soft" else "integer")
    distribution = targets if labels == "soft" else np.eye(NUM_CLASSES)[targets]
    loss = losses.create_loss("kl_divergence", kl_reduction=reduction, label_smoothing=smoothing)

    def reference(inputs):
        smoothed = torch.tensor((1 - smoothing) * distribution + smoothing / NUM_CLASSES)
        log_p = torch.log_softmax(inputs, 1)
        if reduction == "mean":  # PyTorch's own `mean` is to change
            return torch.nn.functional.kl_div(log_p, smoothed, reduction="none").mean()
        return torch.nn.functional.kl_div(log_p, smoothed, reduction="batchmean")

    given = targets if labels == "integer" else distribution
    _assert_equals_pytorch(torch, loss, logits, given, reference)


@pytest.mark.parametrize("kl_reduction", ["batchmean", "mean"])
def test_the_kl_divergence_of_the_target_itself_is_zero(x64, kl_reduction):
    _, target = _example("soft")
    loss = losses.create_loss("kl_divergence", kl_reduction=kl_reduction)
    value, gradient = _mean_and_gradient(loss, jnp.log(jnp.asarray(target)) + 3.0, target)
    assert abs(value) < 1e-14
    np.testing.assert_allclose(gradient, 0, atol=1e-15)


@pytest.mark.parametrize("labels", ["integer", "soft"])
@pytest.mark.parametrize("name", ["kl_divergence", "mse"])
def test_a_class_weight_weighs_the_example_where_terms_cannot_be_weighted(name, labels):
    logits, targets = (jnp.asarray(x) for x in _example(labels))
    weights = np.linspace(0.2, 3, NUM_CLASSES)
    plain = losses.create_loss(name)(logits, targets)
    weighted = losses.create_loss(name, class_weights=weights)(logits, targets)
    np.testing.assert_array_equal(weighted.value, plain.value)
    expected = weights[targets] if labels == "integer" else targets @ weights
    np.testing.assert_allclose(weighted.weight, expected, rtol=1e-6)
    np.testing.assert_array_equal(plain.weight, 1)


@pytest.mark.parametrize("activation", ["none", "softmax"])
@pytest.mark.parametrize("labels", ["integer", "soft"])
def test_the_squared_error_equals_pytorch(torch, x64, activation, labels):
    logits, targets = _example(labels)
    loss = losses.create_loss("mse", activation=activation)
    target = torch.tensor(targets if labels == "soft" else np.eye(NUM_CLASSES)[targets])

    def reference(inputs):
        outputs = torch.softmax(inputs, 1) if activation == "softmax" else inputs
        return torch.nn.functional.mse_loss(outputs, target)

    _assert_equals_pytorch(torch, loss, logits, targets, reference)


@pytest.mark.parametrize("labels", ["integer", "soft"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("margin", [0.0, 0.5, 1.0])
def test_the_multi_margin_loss_equals_pytorch(torch, x64, labels, weighted, p, margin):
    logits, targets = _example(labels)
    weights = np.linspace(0.2, 3, NUM_CLASSES) if weighted else None
    loss = losses.create_loss("multi_margin", margin=margin, p=p, class_weights=weights)

    def reference(inputs):
        def per_label(y, reduction="none"):
            weight = None if weights is None else torch.tensor(weights)
            return torch.nn.functional.multi_margin_loss(
                inputs, y, p=p, margin=margin, weight=weight, reduction=reduction
            )

        if labels == "soft":
            return _expected_over_labels(torch, targets, per_label)
        return per_label(torch.tensor(targets), "mean")

    _assert_equals_pytorch(torch, loss, logits, targets, reference)


def test_a_margin_that_is_met_exactly_has_pytorchs_gradient(torch, x64):
    logits, labels = np.array([[2.0, 1.0, 0.5], [0.0, 1.0, 1.0]]), np.array([0, 2])

    def reference(inputs):
        return torch.nn.functional.multi_margin_loss(inputs, torch.tensor(labels))

    loss = losses.create_loss("multi_margin")
    _assert_equals_pytorch(torch, loss, logits, labels, reference)


@pytest.mark.parametrize("kl_reduction", ["batchmean", "mean"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_hierarchical_loss_equals_pytorch_term_by_term(torch, x64, kl_reduction, weighted):
    (child, parent), labels = _batch_of("hierarchical", "float64")
    weights = np.linspace(0.2, 3, NUM_CLASSES) if weighted else None
    options = {"child_weight": 0.7, "parent_weight": 1.3, "kl_weight": 0.4}
    loss = losses.create_loss(
        "hierarchical",
        parents=PARENTS,
        kl_reduction=kl_reduction,
        label_smoothing=0.1,
        class_weights=weights,
        **options,
    )
    inputs = [torch.tensor(np.asarray(x), requires_grad=True) for x in (child, parent)]
    of_child, of_parent = torch.tensor(np.asarray(labels)).T
    functional = torch.nn.functional
    children = np.array(PARENTS) == np.arange(3)[:, None]
    target = torch.tensor((children / children.sum(1, keepdims=True))[of_parent])
    weight = None if weights is None else torch.tensor(weights)
    log_p = torch.log_softmax(inputs[0], 1)
    share = torch.ones(64).double() if weight is None else weight[of_child]
    share = share / share.sum()
    expected = {
        "child": functional.cross_entropy(inputs[0], of_child, weight, label_smoothing=0.1),
        "parent": share @ functional.cross_entropy(inputs[1], of_parent, reduction="none"),
    }
    if weighted or kl_reduction == "mean":
        rows = functional.kl_div(log_p, target, reduction="none")
        rows = rows.sum(1) if kl_reduction == "batchmean" else rows.mean(1)
        expected["kl"] = share @ rows
    else:
        expected["kl"] = functional.kl_div(log_p, target, reduction="batchmean")
    whole = sum(options[f"{name}_weight"] * term for name, term in expected.items())
    whole.backward()

    value, gradients = _mean_and_gradient(loss, (child, parent), labels)
    np.testing.assert_allclose(value, whole.item(), rtol=1e-12)
    for gradient, reference in zip(gradients, inputs, strict=True):
        np.testing.assert_allclose(gradient, reference.grad, rtol=1e-11, atol=1e-14)
    result = loss((child, parent), labels)
    for name, term in expected.items():
        logged = np.average(result.parts[name], weights=result.weight)
        np.testing.assert_allclose(logged, term.item(), rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("kl_reduction", ["batchmean", "mean"])
def test_a_given_distribution_over_siblings_is_pytorchs_target(torch, x64, kl_reduction):
    (child, parent), labels = _batch_of("hierarchical", "float64")
    drawn = np.random.default_rng(3).random((3, NUM_CLASSES))
    drawn = drawn * (np.array(PARENTS) == np.arange(3)[:, None])
    drawn /= drawn.sum(1, keepdims=True)
    loss = losses.create_loss(
        "hierarchical", parents=PARENTS, siblings=drawn, kl_reduction=kl_reduction
    )
    log_p = torch.log_softmax(torch.tensor(np.asarray(child)), 1)
    target = torch.tensor(drawn[np.asarray(labels)[:, 1]])
    expected = torch.nn.functional.kl_div(log_p, target, reduction=kl_reduction)
    kl = loss((child, parent), labels).parts["kl"].mean()
    np.testing.assert_allclose(kl, expected.item(), rtol=1e-12)

    uniform = losses.create_loss("hierarchical", parents=PARENTS)((child, parent), labels)
    assert abs(uniform.parts["kl"].mean() / kl - 1) > 0.01


def test_a_child_distribution_uniform_over_its_siblings_has_no_divergence():
    child = jnp.where(jnp.array(PARENTS) == 1, 5.0, -1e4)[None]
    loss = losses.create_loss("hierarchical", parents=PARENTS)
    result = loss((child, jnp.zeros((1, 3))), jnp.array([[2, 1]]))
    np.testing.assert_allclose(result.parts["kl"], 0, atol=1e-6)
    np.testing.assert_allclose(result.parts["child"], np.log(3), rtol=1e-6)
    np.testing.assert_allclose(result.parts["parent"], np.log(3), rtol=1e-6)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_parts_of_a_loss_are_known_before_it_runs(name, options):
    result = losses.create_loss(name, **options)(*_batch_of(name))
    assert tuple(result.parts) == losses.parts_of(name)
    assert all(
        part.shape == (64,) for part in (result.value, result.weight, *result.parts.values())
    )


HUGE = np.array([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0], [1e4, -1e4, 0.0]])

# What the labels 0, 1, 2 cost with the logits 1e4, -1e4, 0.
HUGE_VALUES = [
    ("focal", {"gamma": 0.5}, [0, 2e4, 1e4]),
    ("focal", {"gamma": 2.0, "alpha": (1.0, 0.5, 0.1)}, [0, 1e4, 1e3]),
    ("focal", {"form": "sigmoid", "gamma": 1.0}, np.array([0, 2e4, 1e4]) + np.log(2) / 2),
    ("kl_divergence", {}, [0, 2e4, 1e4]),
    ("kl_divergence", {"kl_reduction": "mean"}, [0, 2e4 / 3, 1e4 / 3]),
    ("mse", {}, [(9999**2 + 1e8) / 3, (1e8 + 10001**2) / 3, (2e8 + 1) / 3]),
    ("mse", {"activation": "softmax"}, [0, 2 / 3, 2 / 3]),
    ("multi_margin", {}, [0, (20001 + 10001) / 3, 10001 / 3]),
    ("multi_margin", {"p": 2}, [0, (20001**2 + 10001**2) / 3, 10001**2 / 3]),
]


@pytest.mark.parametrize("labels", [np.arange(3), np.eye(3, dtype=np.float32)])
@pytest.mark.parametrize(("name", "options", "expected"), HUGE_VALUES)
def test_huge_logits_have_the_right_limits(name, options, expected, labels):
    loss = losses.create_loss(name, **options)
    logits = jnp.asarray(HUGE, jnp.float32)
    value = loss(logits, jnp.asarray(labels)).value
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    _, gradient = _mean_and_gradient(loss, logits, labels)
    assert np.all(np.isfinite(gradient))


def test_huge_logits_of_child_and_parent_have_the_right_limits():
    loss = losses.create_loss("hierarchical", parents=(0, 1, 1))
    logits = jnp.asarray(HUGE, jnp.float32), jnp.asarray(HUGE[:, :2], jnp.float32)
    labels = jnp.array([[0, 0], [1, 1], [2, 1]])
    parts = loss(logits, labels).parts
    np.testing.assert_allclose(parts["child"], [0, 2e4, 1e4], rtol=1e-6)
    np.testing.assert_allclose(parts["parent"], [0, 2e4, 2e4], rtol=1e-6)
    np.testing.assert_allclose(parts["kl"], [0, *2 * [1.5e4 - np.log(2)]], rtol=1e-6)
    _, gradients = _mean_and_gradient(loss, logits, labels)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)


@pytest.mark.parametrize(("name", "options"), FLAT_CASES)
def test_in_a_batch_of_one_class_its_weight_cancels(name, options):
    logits, _ = _batch_of(name)
    labels, weights = jnp.full(64, 4), np.linspace(0.2, 3, NUM_CLASSES)
    if name == "cross_entropy":  # whose smoothing spreads the label over classes of other weights
        options = {}
    plain = _mean_and_gradient(losses.create_loss(name, **options), logits, labels)
    weighted = _mean_and_gradient(
        losses.create_loss(name, **options, class_weights=weights), logits, labels
    )
    # Only the multi-margin loss divides by the number of examples.
    factor = weights[4] if name == "multi_margin" else 1.0
    for one, other in zip(plain, weighted, strict=True):
        np.testing.assert_allclose(factor * one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("cross_entropy", {}, 0),
        ("focal", {"gamma": 0.5}, 0),
        ("focal", {"form": "sigmoid", "gamma": 1.0}, np.log1p(np.exp(-2)) / (1 + np.exp(2))),
        ("kl_divergence", {"label_smoothing": 0.1}, 0),
        ("mse", {}, 1),
        ("mse", {"activation": "softmax"}, 0),
        ("multi_margin", {"p": 2}, 0),
    ],
)
def test_a_single_class_gives_what_the_formula_does(name, options, expected):
    loss = losses.create_loss(name, **options)
    value, gradient = _mean_and_gradient(loss, jnp.full((3, 1), 2.0), np.zeros(3, np.int32))
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-7)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_low_precision_logits_are_computed_in_float32(name, options):
    logits, labels = _batch_of(name, jnp.bfloat16)
    high = jax.tree.map(lambda x: x.astype(jnp.float32), logits)
    loss = losses.create_loss(name, **options)
    result = loss(logits, labels)
    assert {x.dtype for x in jax.tree.leaves(result)} == {jnp.dtype("float32")}
    jax.tree.map(np.testing.assert_array_equal, result, loss(high, labels))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_float64_stays_float64(x64, name, options):
    logits, labels = _batch_of(name, "float64")
    weights = np.linspace(0.2, 3, NUM_CLASSES)
    for changes in ({}, {"class_weights": weights}):
        result = losses.create_loss(name, **options, **changes)(logits, labels)
        assert {x.dtype for x in jax.tree.leaves(result)} == {jnp.dtype("float64")}
    if name != "hierarchical":
        soft = jax.nn.one_hot(labels, NUM_CLASSES, dtype=jnp.float32)
        result = losses.create_loss(name, **options)(logits, soft)
        assert result.value.dtype == result.weight.dtype == jnp.float64


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_compiled_loss_gives_the_same(name, options):
    logits, labels = _batch_of(name)
    loss = losses.create_loss(name, **options, class_weights=np.linspace(0.2, 3, NUM_CLASSES))
    alone, compiled = loss(logits, labels), jax.jit(loss)(logits, labels)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), alone, compiled
    )


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
    effective = losses.class_weights("effective_number", counts, beta=0.9)
    by_hand = 0.1 / (1 - 0.9 ** np.array(counts))
    np.testing.assert_allclose(effective, 3 * by_hand / by_hand.sum(), rtol=1e-12)


def test_the_effective_number_is_exact_where_beta_is_near_one():
    """1 - beta^n by binomial expansion in exact fractions; the plain power keeps 4 digits."""
    beta, counts = 1 - 2.0**-40, [1, 2, 3]
    exact = [float(1 - Fraction(beta) ** n) for n in counts]
    expected = 3 / np.array(exact) / np.sum(1 / np.array(exact))
    weights = losses.class_weights("effective_number", counts, beta=beta)
    np.testing.assert_allclose(weights, expected, rtol=1e-15)


def test_the_effective_number_lies_between_equal_and_balanced_weights():
    counts = [10, 30, 60]
    nearly_none = losses.class_weights("effective_number", counts, beta=1e-6)
    nearly_balanced = losses.class_weights("effective_number", counts, beta=1 - 1e-12)
    balanced = losses.class_weights("balanced", counts)
    np.testing.assert_allclose(nearly_none, 1, rtol=1e-12)
    np.testing.assert_allclose(nearly_balanced, 3 * balanced / balanced.sum(), rtol=1e-9)


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
        ("effective_number", [3, 0], (), "class 1, which has no training example"),
    ],
)
def test_impossible_class_weights_are_refused(kind, counts, values, message):
    beta = 0.9 if kind == "effective_number" else None
    with pytest.raises(InputError, match=message):
        losses.class_weights(kind, counts, values, beta)


@pytest.mark.parametrize("beta", [None, 0.0, 1.0, -0.5, float("nan")])
def test_a_beta_out_of_its_range_is_refused(beta):
    with pytest.raises(InputError, match=f"loss.beta: {beta} is not between 0 and 1; give 0.999"):
        losses.class_weights("effective_number", [1, 2], beta=beta)
    with pytest.raises(InputError, match=r"set loss\.class_weights to 'effective_number'"):
        losses.class_weights("balanced", [1, 2], beta=0.9)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cross_entropy", {"label_smoothing": 1.0}, r"not in \[0, 1\)"),
        ("cross_entropy", {"label_smoothing": float("nan")}, r"not in \[0, 1\)"),
        ("cross_entropy", {"label_smothing": 0.1}, "did you mean 'label_smoothing'"),
        ("cross_entropy", {"class_weights": [1.0, -1.0]}, "none below 0"),
        ("cross_entropy", {"class_weights": [1.0, float("inf")]}, "finite"),
        ("cross_entropy", {"class_weights": [0.0, 0.0]}, "all are 0"),
        (
            "cross_entropy",
            {"class_weights": [1.0, 0.0], "label_smoothing": 0.1},
            "class 1 has weight 0",
        ),
        ("focal", {"label_smoothing": 0.1}, "loss.label_smoothing: not used by 'focal'"),
        ("focal", {"form": "sigmod"}, "loss.form: unknown 'sigmod'; did you mean 'sigmoid'"),
        ("focal", {"gamma": -1.0}, "loss.gamma: -1.0 must be finite and at least 0"),
        ("focal", {"gamma": float("nan")}, "loss.gamma: nan must be finite"),
        ("focal", {"alpha": (0.5, -0.5)}, "loss.alpha: .* none below 0"),
        ("focal", {"alpha": (0.0,)}, "loss.alpha: .* not all 0"),
        ("focal", {"class_weights": [1.0, -1.0]}, "none below 0"),
        ("kl_divergence", {"label_smoothing": -0.1}, r"not in \[0, 1\)"),
        ("kl_divergence", {"kl_reduction": "sum"}, "loss.kl_reduction: unknown 'sum'"),
        ("mse", {"activation": "sigmoid"}, "loss.activation: unknown 'sigmoid'"),
        ("multi_margin", {"p": 3}, "loss.p: unknown 3; choose one of 1, 2"),
        ("multi_margin", {"margin": -1.0}, "loss.margin: -1.0 must be finite and at least 0"),
        ("hierarchical", {}, "needs the parent of each class, which these data do not have"),
        ("hierarchical", {"parents": (0, 2)}, "leave out parent 1"),
        ("hierarchical", {"parents": (0, -1)}, "must be whole numbers from 0"),
        ("hierarchical", {"parents": (0.0, 1.0)}, "must be whole numbers from 0"),
        (
            "hierarchical",
            {"parents": (0, 1, 1), "siblings": np.eye(2)},
            r"siblings: shape \(2, 2\) for 2 parents of 3 classes; give a row a parent",
        ),
        (
            "hierarchical",
            {"parents": (0, 1, 1), "siblings": [[1, 0, 0], [0, 0.5, 0.4]]},
            r"siblings: row 1, \[0.0, 0.5, 0.4\], is no distribution",
        ),
        (
            "hierarchical",
            {"parents": (0, 1, 1), "siblings": [[1, 0, 0], [0, 1.5, -0.5]]},
            "siblings: row 1, .* is no distribution",
        ),
        (
            "hierarchical",
            {"parents": (0, 1, 1), "siblings": [[float("nan"), 0, 0], [0, 1, 0]]},
            "siblings: row 0, .* is no distribution",
        ),
        (
            "hierarchical",
            {"parents": (0, 1, 1), "siblings": [[0.9, 0.1, 0], [0, 1, 0]]},
            "siblings: row 0 has 0.1 for class 1, which is no child of that parent",
        ),
        ("hierarchical", {"parents": (0, 1), "kl_weight": -1.0}, "loss.kl_weight: -1.0 must be"),
        (
            "hierarchical",
            {"parents": (0, 1), "child_weight": 0, "parent_weight": 0, "kl_weight": 0},
            "all 0, so that nothing is learnt",
        ),
    ],
)
def test_impossible_options_are_refused(name, options, message):
    with pytest.raises(InputError, match=message):
        losses.create_loss(name, **options)


def test_an_unknown_loss_is_refused_with_the_nearest_name():
    with pytest.raises(InputError, match="did you mean 'cross_entropy'"):
        losses.create_loss("crossentropy")
    with pytest.raises(InputError, match="did you mean 'hierarchical'"):
        losses.parts_of("hierarchic")


@pytest.mark.parametrize(("name", "options"), FLAT_CASES)
def test_class_weights_of_the_wrong_length_are_refused(name, options):
    loss = losses.create_loss(name, **options, class_weights=[1.0, 2.0])
    with pytest.raises(InputError, match="2 weights for 3 classes"):
        loss(jnp.zeros((4, 3)), jnp.zeros(4, jnp.int32))


def test_an_alpha_of_the_wrong_length_is_refused():
    loss = losses.create_loss("focal", alpha=(0.25, 0.75))
    with pytest.raises(InputError, match=r"loss\.alpha: 2 numbers for 3 classes"):
        loss(jnp.zeros((4, 3)), jnp.zeros(4, jnp.int32))


@pytest.mark.parametrize(("name", "options"), FLAT_CASES)
def test_child_and_parent_are_refused_by_a_loss_of_one_label(name, options):
    loss = losses.create_loss(name, **options)
    pairs = jnp.zeros((4, 2), jnp.int32)
    with pytest.raises(InputError, match=r"takes one label an image.*use 'hierarchical'"):
        loss(jnp.zeros((4, 2)), pairs)
    with pytest.raises(InputError, match=r"takes one label an image.*use 'hierarchical'"):
        loss((jnp.zeros((4, 2)), jnp.zeros((4, 2))), pairs[:, 0])


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((4, 3)), np.zeros((4, 2), int), "the model gives one set of logits"),
        ((np.zeros((4, 3)), np.zeros((4, 2))), np.zeros(4, int), r"integer labels \(N, 2\)"),
        ((np.zeros((4, 3)), np.zeros((4, 2))), np.zeros((4, 2)), "without mixup or cutmix"),
        (
            (np.zeros((4, 5)), np.zeros((4, 2))),
            np.zeros((4, 2), int),
            "told of 3 child and 2 parent classes and the model has 5 and 2",
        ),
    ],
)
def test_what_is_not_child_and_parent_is_refused_by_the_hierarchical_loss(logits, labels, message):
    loss = losses.create_loss("hierarchical", parents=(0, 1, 1))
    with pytest.raises(InputError, match=message):
        loss(jax.tree.map(jnp.asarray, logits), jnp.asarray(labels))
