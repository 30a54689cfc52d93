"""Metric states against scikit-learn: exact counts for any batches, merges, masks and devices."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as reference

from flaxcls import losses, metrics
from flaxcls.errors import InputError

CROSS_ENTROPY = losses.create_loss("cross_entropy", label_smoothing=0.1)


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@partial(jax.jit, donate_argnums=0)
def _update(state, logits, labels, mask, step):
    return state.update(logits, labels, CROSS_ENTROPY(logits, labels), mask, step)


def _examples(n, num_classes, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, n).astype(np.int32)
    logits = rng.normal(size=(n, num_classes)).astype(np.float32)
    logits[np.arange(n), labels] += rng.normal(1.5, 1, n).astype(np.float32)
    return logits, labels


def _evaluate(logits, labels, batch_size, top_k=5):
    """Evaluates as a run does: the last batch padded with rows of NaN, and masked."""
    state = metrics.empty(logits.shape[1], top_k=top_k)
    for step, start in enumerate(range(0, len(labels), batch_size)):
        stop = min(start + batch_size, len(labels))
        padding = batch_size - (stop - start)
        state = _update(
            state,
            np.pad(logits[start:stop], ((0, padding), (0, 0)), constant_values=np.nan),
            np.pad(labels[start:stop], (0, padding)),
            np.arange(batch_size) < stop - start,
            np.int32(step),
        )
    return jax.device_get(state)


def _assert_equals_scikit_learn(result, labels, logits, num_classes):
    predictions, classes = logits.argmax(axis=1), np.arange(num_classes)
    scores = partial(
        reference.precision_recall_fscore_support,
        labels,
        predictions,
        labels=classes,
        zero_division=0,
    )
    precision, recall, f1, support = scores()
    assert result["support"] == support.tolist()
    assert result["accuracy"] == reference.accuracy_score(labels, predictions)
    for name, values in {"precision": precision, "recall": recall, "f1": f1}.items():
        np.testing.assert_array_max_ulp(np.array(result[name]), values)
    for average in ("macro", "weighted"):
        # Without `labels`: over the classes that occur.
        for name, value in zip(
            ("precision", "recall", "f1"), scores(average=average, labels=None), strict=False
        ):
            assert result[f"{name}_{average}"] == pytest.approx(value, rel=1e-14)
    assert result["class_accuracy"] == result["recall"]


def test_macro_means_leave_out_classes_that_do_not_occur():
    # Class 3 is neither there nor predicted; class 2 is predicted only, and counts as 0.
    labels = np.array([0, 0, 1, 1], np.int32)
    logits = np.eye(4, dtype=np.float32)[[0, 0, 1, 2]]
    result = metrics.compute(_evaluate(logits, labels, 4))
    assert result["recall_macro"] == pytest.approx((1 + 0.5 + 0) / 3)
    _assert_equals_scikit_learn(result, labels, logits, 4)


@pytest.mark.parametrize(
    ("n", "num_classes", "batch_size"), [(1000, 200, 96), (997, 10, 64), (50, 2, 7), (5, 3, 8)]
)
def test_metrics_equal_scikit_learn_for_any_batch_size(n, num_classes, batch_size):
    logits, labels = _examples(n, num_classes)
    state = _evaluate(logits, labels, batch_size)
    result = metrics.compute(state)
    _assert_equals_scikit_learn(result, labels, logits, num_classes)
    np.testing.assert_array_equal(
        metrics.confusion(state),
        reference.confusion_matrix(labels, logits.argmax(axis=1), labels=np.arange(num_classes)),
    )
    if num_classes > 5:
        assert result["top_5"] == reference.top_k_accuracy_score(
            labels, logits, k=5, labels=np.arange(num_classes)
        )
    assert ("top_5" in result) == (num_classes > 5)
    expected = np.asarray(CROSS_ENTROPY(jnp.asarray(logits), labels).value, np.float64).mean()
    assert result["loss"] == pytest.approx(expected, rel=1e-6)
    assert metrics.running(state.replace(confusion_matrix=None)) == (
        result["loss"],
        result["accuracy"],
    )
    assert state.first_bad_step == -1


def test_classes_never_seen_or_never_predicted_count_as_scikit_learn_counts_them():
    logits, labels = _examples(200, 10)
    labels %= 6
    logits[:, 3] = logits[:, 8] = -50
    _assert_equals_scikit_learn(
        metrics.compute(_evaluate(logits, labels, 64)), labels, logits, num_classes=10
    )


def test_merging_is_commutative_and_equals_one_state():
    logits, labels = _examples(300, 12)
    first, second = (
        _evaluate(logits[part], labels[part], 50) for part in (slice(0, 130), slice(130, 300))
    )
    one = metrics.compute(_evaluate(logits, labels, 50))
    forward, backward = jax.device_get((first.merge(second), second.merge(first)))
    jax.tree.map(np.testing.assert_array_equal, forward, backward)
    merged = metrics.compute(forward)
    assert merged.pop("loss") == pytest.approx(one.pop("loss"), rel=1e-7)
    assert merged == one
    jax.tree.map(
        np.testing.assert_array_equal, forward, jax.device_get(forward.merge(metrics.empty(12)))
    )


def test_states_stacked_by_device_reduce_to_their_merge():
    logits, labels = _examples(300, 12)
    states = [_evaluate(logits[i::3], labels[i::3], 50) for i in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    merged = states[0].merge(states[1]).merge(states[2])
    jax.tree.map(np.testing.assert_array_equal, stacked.reduce(), merged)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_equal_logits_rank_by_class_so_that_top_1_is_the_accuracy(k):
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 2, (200, 4)).astype(np.float32)
    labels = rng.integers(0, 4, 200).astype(np.int32)
    result = metrics.compute(_evaluate(logits, labels, 32, top_k=k))
    ranked = np.argsort(-logits, axis=1, kind="stable")
    assert result[f"top_{k}"] == np.any(ranked[:, :k] == labels[:, None], axis=1).mean()
    assert result["accuracy"] == (logits.argmax(axis=1) == labels).mean()
    if k == 1:
        assert result["top_1"] == result["accuracy"]


def test_nan_logits_predict_what_numpy_predicts_and_are_in_no_top_k():
    logits, labels = _examples(20, 6)
    logits[3] = np.nan
    logits[7, 4] = np.nan
    labels[3], labels[7] = 0, 1
    state = _evaluate(logits, labels, 20, top_k=1)
    np.testing.assert_array_equal(
        metrics.confusion(state),
        reference.confusion_matrix(labels, logits.argmax(axis=1), labels=np.arange(6)),
    )
    result = metrics.compute(state)
    clean = np.delete(np.arange(20), [3, 7])
    assert result["top_1"] == np.sum(logits.argmax(axis=1)[clean] == labels[clean]) / 20
    assert np.isnan(result["loss"])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_first_step_with_a_loss_that_is_not_finite_is_recorded(bad):
    logits, labels = _examples(8, 3)
    broken = logits.copy()
    broken[5] = bad
    state, everything = metrics.empty(3), np.ones(8, bool)
    for step, batch in [(10, logits), (11, broken), (12, logits), (13, broken)]:
        masked = _update(metrics.empty(3), batch, labels, np.arange(8) != 5, np.int32(step))
        assert masked.first_bad_step == -1
        state = _update(state, batch, labels, everything, np.int32(step))
    assert state.first_bad_step == 11
    later = metrics.empty(3).replace(first_bad_step=jnp.int32(15))
    for other, expected in [(later, 11), (metrics.empty(3), 11)]:
        assert state.merge(other).first_bad_step == expected
        assert other.merge(state).first_bad_step == expected


def test_weights_and_parts_are_averaged_with_the_losses_weights():
    value, weight = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.5, 1.0, 2.0, 7.0])
    part = np.array([0.1, 0.2, 0.3, np.nan])
    mask = np.array([True, True, True, False])
    loss = losses.Loss(*map(jnp.asarray, (value, weight)), {"distillation": jnp.asarray(part)})
    state = metrics.empty(3, parts=("distillation",))
    state = state.update(jnp.zeros((4, 3)), jnp.zeros(4, jnp.int32), loss, mask, 0)
    result = metrics.compute(jax.device_get(state))
    assert result["loss"] == pytest.approx(np.average(value[:3], weights=weight[:3]), rel=1e-6)
    expected = np.average(part[:3], weights=weight[:3])
    assert result["distillation"] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="distillation"):
        metrics.empty(3).update(jnp.zeros((4, 3)), jnp.zeros(4, jnp.int32), loss, mask, 0)


def test_the_loss_of_a_million_examples_is_accurate_in_float32():
    terms = np.random.default_rng(0).exponential(0.7, (4000, 256)).astype(np.float32)

    def add(total, batch):
        return (total[0].add(batch), total[1] + jnp.sum(batch)), None

    zero = (metrics.RunningSum.empty(), jnp.zeros(()))
    (total, plain), _ = jax.jit(lambda terms: jax.lax.scan(add, zero, terms))(terms)
    exact = terms.sum(dtype=np.float64)
    assert jax.device_get(total).compute() == pytest.approx(exact, rel=2e-8)
    assert abs(float(plain) - exact) / exact > 1e-6


@pytest.mark.usefixtures("x64")
def test_float64_losses_are_summed_in_float64_and_types_never_change():
    logits, labels = _examples(100, 10)
    logits = logits.astype(np.float64)
    state = _evaluate(logits, labels, 30)
    result = metrics.compute(state)
    exact = CROSS_ENTROPY(jnp.asarray(logits), labels).value
    assert result["loss"] == pytest.approx(float(exact.mean()), rel=1e-14)
    for before, after in zip(
        jax.tree.leaves(metrics.empty(10)), jax.tree.leaves(state), strict=True
    ):
        assert before.dtype == after.dtype


def test_states_pass_through_scan():
    logits, labels = _examples(120, 10)

    def body(state, batch):
        return state.update(*batch, CROSS_ENTROPY(*batch), jnp.ones(30, bool), 0), None

    batches = (jnp.asarray(logits).reshape(4, 30, 10), jnp.asarray(labels).reshape(4, 30))
    state, _ = jax.lax.scan(body, metrics.empty(10), batches)
    np.testing.assert_array_equal(
        metrics.confusion(state), metrics.confusion(_evaluate(logits, labels, 30))
    )
    assert state.compute() == metrics.compute(jax.device_get(state))


def test_nothing_seen_gives_nan_and_not_an_error():
    result = metrics.compute(jax.device_get(metrics.empty(10)))
    assert all(np.isnan(result[name]) for name in ("loss", "accuracy", "top_5"))
    assert result["f1_macro"] == result["f1_weighted"] == 0
    assert result["support"] == [0] * 10


@pytest.mark.parametrize("label", [-1, 4, 100])
def test_a_label_out_of_range_is_an_error_and_moves_no_count(label):
    logits, labels = _examples(9, 4)
    labels[2] = label
    state = _evaluate(logits, labels, 9)
    keep = np.arange(9) != 2
    np.testing.assert_array_equal(
        state.confusion_matrix,
        reference.confusion_matrix(labels[keep], logits.argmax(axis=1)[keep], labels=np.arange(4)),
    )
    with pytest.raises(InputError, match=r"1 of 9 examples have a label outside 0\.\.3"):
        metrics.compute(state)


EIGHT_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from flaxcls import losses, metrics

assert jax.device_count() == 8
loss = losses.create_loss("cross_entropy")
def update(state, logits, labels, mask, step):
    return state.update(logits, labels, loss(logits, labels), mask, step)

mesh = Mesh(np.array(jax.devices()), ("data",))
whole, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
rng = np.random.default_rng(0)
logits = rng.normal(size=(3, 64, 200)).astype(np.float32)
labels = rng.integers(0, 200, (3, 64)).astype(np.int32)
mask = rng.random((3, 64)) < 0.8
sharded = jax.jit(update, donate_argnums=0, out_shardings=whole)
many, one = jax.device_put(metrics.empty(200), whole), metrics.empty(200)
for step in range(3):
    batch = (logits[step], labels[step], mask[step])
    many = sharded(many, *jax.device_put(batch, split), np.int32(step))
    one = jax.jit(update)(one, *batch, np.int32(step))
many, one = jax.device_get((many, one))
for name in ("confusion_matrix", "count", "correct", "top_k_correct", "first_bad_step"):
    np.testing.assert_array_equal(getattr(many, name), getattr(one, name))
np.testing.assert_allclose(many.loss.compute(), one.loss.compute(), rtol=1e-6)
program = sharded.lower(jax.device_put(one, whole), *jax.device_put(batch, split), np.int32(0))
reductions = [line for line in program.compile().as_text().splitlines() if "all-reduce(" in line]
assert reductions and not any("40000" in line or "200,200" in line for line in reductions)
print("equal")
"""


def test_eight_devices_count_as_one_and_send_no_matrix_to_each_other():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    result = subprocess.run(
        [sys.executable, "-c", EIGHT_DEVICES],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.strip() == "equal", result.stderr


def test_parents_are_counted_from_their_own_logits_and_errors_by_whose_children_they_are():
    """Classes 0 and 1 belong to parent 0, class 2 to parent 1."""
    parents = (0, 0, 1)
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(64, 3)).astype(np.float32), rng.normal(size=(64, 2)))
    labels = rng.integers(0, 3, 64)
    labels = np.stack([labels, np.array(parents)[labels]], axis=1).astype(np.int32)
    mask = np.arange(64) < 50
    loss = losses.Loss(jnp.ones(64), jnp.ones(64), {})
    state = metrics.empty(3, top_k=2, parents=parents)
    update = jax.jit(metrics.MetricState.update)
    halves = [
        update(
            state,
            tuple(x[part] for x in logits),
            labels[part],
            jax.tree.map(lambda x, part=part: x[part], loss),
            mask[part],
            0,
        )
        for part in (slice(0, 32), slice(32, 64))
    ]
    result = halves[0].merge(halves[1]).compute()

    predicted = logits[0].argmax(1)[:50]
    truth, parent = labels[:50].T
    wrong = predicted != truth
    assert result["accuracy"] == np.mean(~wrong)
    assert result["parent_accuracy"] == np.mean(logits[1].argmax(1)[:50] == parent)
    mild = np.array(parents)[predicted[wrong]] == parent[wrong]
    assert result["errors_within_parent"] == pytest.approx(mild.mean())
    assert 0 < mild.mean() < 1


def test_without_errors_all_are_within_the_parent():
    assert metrics.errors_within_parent(np.diag([3, 4, 5]), (0, 0, 1)) == 1.0
