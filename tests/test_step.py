"""The training step: parts of a batch, averages, dtypes, placements, and PyTorch's own step."""

import functools
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flaxcls import metrics, ops, sharding, step
from flaxcls.augment import Augmentation, augment
from flaxcls.batch import Batch, Preprocess, preprocess
from flaxcls.losses import create_loss
from flaxcls.models import create_model
from flaxcls.optimizers import create_optimizer, create_schedule
from flaxcls.state import Stream, create_state, stream_key

CLASSES, SIZE, STEPS_PER_EPOCH = 5, 8, 4
CLASS_WEIGHTS = np.array([0.5, 1.0, 2.0, 1.5, 0.25])


class Small(nn.Module):
    """A network with everything that a step has to carry, which compiles in a moment."""

    batch_norm: bool = True
    dropout: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, train=False):
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = ops.Conv(4, (3, 3), name="conv", **dtypes)(images)
        if self.batch_norm:
            x = ops.BatchNorm(name="norm", **dtypes)(x, use_running_average=not train)
        x = ops.max_pool(nn.relu(x), (2, 2))
        x = nn.Dropout(self.dropout, deterministic=not train)(x.reshape(len(x), -1))
        x = ops.Dense(CLASSES, name="head", **dtypes)(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def make_recipe(
    model=None, *, learning_rate=0.1, optimizer="sgd", options=None, loss=None, size=SIZE, **changes
):
    schedule = create_schedule(
        "constant", learning_rate, steps_per_epoch=STEPS_PER_EPOCH, epochs=10
    )
    recipe = step.Recipe(
        model=model or Small(),
        loss=create_loss("cross_entropy", **(loss or {})),
        optimizer=create_optimizer(optimizer, schedule, **(options or {})),
        schedule=schedule,
        preprocess=Preprocess(size, 1, (0.4,), (0.3,)),
        augmentation=Augmentation(),
        num_classes=CLASSES,
        seed=3,
        steps_per_epoch=STEPS_PER_EPOCH,
    )
    return recipe._replace(**changes)


def draw_variables(model, images):
    """Variables as `model.init` shapes them, without compiling it, which outlasts a step."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)
    fixed = {"mean": np.zeros, "var": np.ones, "bias": np.zeros, "scale": np.ones}

    def draw(path, leaf):
        if make := fixed.get(path[-1].key):
            return make(leaf.shape, leaf.dtype)
        return rng.normal(0, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape).astype(leaf.dtype)

    return jax.tree.map_with_path(draw, shapes)


def start(recipe, *, plateau=False):
    """A new state and empty metrics."""
    shape = (recipe.preprocess.size, recipe.preprocess.size, recipe.preprocess.channels)
    state = create_state(
        SimpleNamespace(init=lambda key, images, train: draw_variables(recipe.model, images)),
        recipe.optimizer,
        shape,
        seed=recipe.seed,
        ema=recipe.ema_decay > 0,
        plateau=plateau,
        dtype=recipe.dtype,
    )
    return jax.device_get((state, metrics.empty(recipe.num_classes, top_k=2)))


# Compiling takes longer than all steps that a test takes; without LLVM's optimisation, 40 % less.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


@functools.cache
def compiled(recipe):
    return quick_jit(partial(step.train_step, recipe))


def make_batch(seed=0, n=16, size=SIZE, padding=0):
    rng = np.random.default_rng(seed)
    return Batch(
        image=rng.integers(0, 256, (n, size, size, 1), np.uint8),
        label=rng.integers(0, CLASSES, n).astype(np.int32),
        mask=np.arange(n) < n - padding,
        index=rng.permutation(100)[:n].astype(np.int32),
    )


def run(recipe, batches, *, plateau=False):
    """The state, the metrics and the last totals after one step a batch."""
    state, counted = start(recipe, plateau=plateau)
    for batch in batches:
        state, counted, totals = compiled(recipe)(state, counted, batch)
    return SimpleNamespace(state=state, metrics=counted, totals=totals)


def difference(a, b):
    return jax.tree.map(np.subtract, jax.device_get(a), jax.device_get(b))


def assert_trees_close(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(partial(np.testing.assert_allclose, **tolerance), a, b)


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


FLOAT64 = {"dtype": jnp.float64, "param_dtype": jnp.float64}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("parts", "sum_loss"), [(2, False), (4, True)])
def test_an_accumulated_step_equals_the_whole_batch(parts, sum_loss):
    # Padding and class weights make the micro-batches' weights differ, which the sums must respect.
    recipe = make_recipe(
        Small(batch_norm=False, **FLOAT64),
        loss={"class_weights": CLASS_WEIGHTS, "label_smoothing": 0.1},
        learning_rate=0.01,
        options={"momentum": 0.9, "clip_norm": 0.5},
        sum_loss=sum_loss,
        dtype=jnp.dtype("float64"),
    )
    batches = [make_batch(seed, padding=3) for seed in range(2)]
    whole, split = run(recipe, batches), run(recipe._replace(accumulate=parts), batches)
    assert_trees_close(split.state, whole.state, rtol=1e-12, atol=1e-14)
    a, b = (metrics.compute(jax.device_get(r.metrics)) for r in (split, whole))
    np.testing.assert_allclose(a.pop("loss"), b.pop("loss"), rtol=1e-14)
    assert a == b


def test_batch_norm_follows_each_micro_batch():
    recipe = make_recipe(accumulate=2)
    batch = make_batch()
    state, _ = start(recipe)
    expected = state.batch_stats

    @quick_jit
    def batch_stats_after(old, image):
        variables = {"params": state.params, "batch_stats": old}
        images = preprocess(image, recipe.preprocess)
        return recipe.model.apply(variables, images, train=True, mutable=["batch_stats"])[1]

    for part in range(2):
        expected = batch_stats_after(expected, batch.image[part::2])["batch_stats"]
    assert_trees_close(run(recipe, [batch]).state.batch_stats, expected, rtol=1e-5, atol=1e-6)


def test_a_loss_summed_over_the_batch_moves_as_many_times_as_far():
    batch = make_batch(padding=4)
    recipe = make_recipe(learning_rate=0.01)
    before = start(recipe)[0].params
    mean, total = (run(recipe._replace(sum_loss=s), [batch]) for s in (False, True))
    moved = [difference(r.state.params, before) for r in (mean, total)]
    assert_trees_close(moved[1], jax.tree.map(lambda x: 12 * x, moved[0]), rtol=1e-3, atol=1e-6)
    assert metrics.running(jax.device_get(total.metrics)) == metrics.running(
        jax.device_get(mean.metrics)
    )


def test_dropout_is_the_step_s_own_and_each_micro_batch_s():
    batch = make_batch()
    same = batch.replace(image=batch.image[:1].repeat(16, 0), label=batch.label[:1].repeat(16))
    # One example a micro-batch: with one mask for all, half of the features would get no gradient.
    recipe = make_recipe(Small(batch_norm=False, dropout=0.5), accumulate=16)

    def moved(at_step):
        state, counted = start(recipe)
        before = jax.device_get(state.params["head"]["kernel"])
        state, _, _ = compiled(recipe)(state.replace(step=np.int32(at_step)), counted, same)
        return before - state.params["head"]["kernel"]

    first, again, later = moved(0), moved(0), moved(1)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - later).max() > 1e-4
    plain = make_recipe(Small(batch_norm=False), accumulate=16)
    state = run(plain, [same]).state
    active = (
        np.abs(start(plain)[0].params["head"]["kernel"] - state.params["head"]["kernel"]).max(1) > 0
    )
    assert active.mean() > 0.3
    assert (np.abs(first).max(1)[active] > 0).mean() > 0.95


def test_the_average_of_the_parameters_is_that_of_numpy():
    recipe = make_recipe(ema_decay=0.3, options={"momentum": 0.9})
    state, counted = start(recipe)
    average = jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
    for number in range(5):
        state, counted, _ = compiled(recipe)(state, counted, make_batch(number))
        decay = min(0.3, (1 + number) / (10 + number))
        now = jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
        average = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * new, average, now)
        assert_trees_close(state.ema, average, rtol=1e-5, atol=1e-6)
    assert_trees_close(state.variables(), state.ema, rtol=0, atol=0)
    assert (
        np.abs(average["params"]["head"]["kernel"] - now["params"]["head"]["kernel"]).max() > 0.01
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_plateau_scale_multiplies_the_learning_rate(optimizer):
    options = {"weight_decay": 0.1} | ({"momentum": 0.9} if optimizer == "sgd" else {})
    recipe = make_recipe(learning_rate=0.02, optimizer=optimizer, options=options)
    before = run(recipe, [make_batch()], plateau=True).state
    moved, states = [], []
    for scale in (1.0, 0.1):
        scaled = before.replace(learning_rate_scale=np.float32(scale))
        after, _, totals = compiled(recipe)(scaled, start(recipe)[1], make_batch(1))
        np.testing.assert_allclose(totals.learning_rate, 0.02 * scale, rtol=1e-6)
        moved.append(difference(after.params, before.params))
        states.append((after.opt_state, after.batch_stats))
    tenth = jax.tree.map(lambda x: x / 10, moved[0])
    assert_trees_close(moved[1], tenth, rtol=1e-3, atol=1e-7)
    assert_trees_equal(*states)


def test_mixed_labels_reach_the_loss_and_true_ones_the_accuracy():
    recipe = make_recipe(
        Small(batch_norm=False), augmentation=Augmentation(mixup=1.0), accumulate=2
    )
    batch = make_batch()
    state, _ = start(recipe)

    @quick_jit
    def augmented():
        images, targets = augment(
            batch,
            key=stream_key(recipe.seed, Stream.AUGMENT),
            epoch=0,
            step=0,
            augmentation=recipe.augmentation,
            preprocess=recipe.preprocess,
            num_classes=CLASSES,
        )
        return recipe.model.apply({"params": state.params}, images), targets

    logits, targets = (np.float64(x) for x in augmented())
    assert targets.shape == (16, CLASSES)
    assert ((targets > 0).sum(axis=1) > 1).any(), "nothing was mixed"
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    result = metrics.compute(jax.device_get(run(recipe, [batch]).metrics))
    expected = -(targets * log_probabilities).sum(axis=1).mean()
    np.testing.assert_allclose(result["loss"], expected, rtol=1e-5)
    assert result["accuracy"] == (logits.argmax(axis=1) == batch.label).mean()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_float64_stays_float64(optimizer):
    options = {"momentum": 0.9} if optimizer == "sgd" else {}
    recipe = make_recipe(
        Small(dropout=0.1, **FLOAT64),
        optimizer=optimizer,
        options={"weight_decay": 0.1, "clip_norm": 1.0, **options},
        ema_decay=0.9,
        accumulate=2,
        dtype=jnp.dtype("float64"),
    )
    result = run(recipe, [make_batch()] * 2)
    kept = result.state, result.metrics.loss
    for path, leaf in jax.tree.leaves_with_path(kept):
        dtypes = (jnp.float64,) if jnp.issubdtype(leaf.dtype, jnp.floating) else (jnp.int32,)
        assert leaf.dtype in dtypes, jax.tree_util.keystr(path)
    state, counted = start(recipe)
    _, logits = jax.eval_shape(
        partial(step.eval_step, recipe), state.variables(), counted, make_batch()
    )
    assert logits.dtype == jnp.float64
    # Nor is anything rounded on the way: no array of a lower precision is made anywhere.
    jaxpr = jax.make_jaxpr(partial(step.train_step, recipe))(state, counted, make_batch())
    assert {dtype for dtype in array_dtypes(jaxpr.jaxpr) if dtype.itemsize < 8} <= {
        np.dtype(name) for name in ("uint8", "int32", "uint32", "bool")
    }


def array_dtypes(jaxpr):
    """The NumPy dtypes of all arrays (not scalars) that a jaxpr computes, inner ones included."""
    found = set()
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            if variable.aval.ndim and isinstance(variable.aval.dtype, np.dtype):
                found.add(variable.aval.dtype)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found |= array_dtypes(inner)
    return found


def test_bfloat16_computes_low_and_keeps_float32():
    recipe = make_recipe(Small(dtype=jnp.bfloat16), dtype=jnp.dtype("bfloat16"))
    batch = make_batch()
    result = run(recipe, [batch] * 2)
    for path, leaf in jax.tree.leaves_with_path((result.state, result.metrics, result.totals)):
        assert leaf.dtype in (jnp.float32, jnp.int32), jax.tree_util.keystr(path)
    state, counted = start(recipe)
    evaluate = partial(step.eval_step, recipe)
    _, logits = jax.eval_shape(evaluate, state.variables(), counted, batch)
    assert logits.dtype == jnp.float32
    jaxpr = jax.make_jaxpr(partial(step.train_step, recipe))(state, counted, batch)
    assert np.dtype(jnp.bfloat16) in array_dtypes(jaxpr.jaxpr)
    exact = run(make_recipe(), [batch] * 2)
    assert_trees_close(result.state.params, exact.state.params, rtol=0.05, atol=0.02)


def test_a_split_on_the_device_gives_the_step_of_a_batch_that_carries_its_images():
    images = np.random.default_rng(0).integers(0, 256, (100, SIZE, SIZE, 1), np.uint8)
    labels = np.random.default_rng(1).integers(0, CLASSES, 100).astype(np.int32)
    recipe = make_recipe(
        augmentation=Augmentation(horizontal_flip=0.5, crop_padding=1, erasing=0.5)
    )
    carried = make_batch()
    carried = carried.replace(image=images[carried.index], label=labels[carried.index])
    sent = carried.replace(image=None, label=None)
    resident = step.Resident(image=images, label=labels)
    a = compiled(recipe)(*start(recipe), carried)
    b = compiled(recipe)(*start(recipe), sent, resident)
    assert_trees_equal(a, b)


def test_several_steps_in_one_call_equal_single_steps():
    recipe = make_recipe(
        Small(dropout=0.2),
        augmentation=Augmentation(horizontal_flip=0.5),
        options={"momentum": 0.9},
        ema_decay=0.9,
    )
    mesh = sharding.create_mesh(1)
    replicated = sharding.replicated(mesh)
    batches = [make_batch(seed) for seed in range(6)]  # into the second epoch
    single = run(recipe, batches)
    state, counted = start(recipe)
    shardings = sharding.state_shardings(state, mesh, shard_params=False)
    take = step.compile_train_step(recipe, shardings, replicated, steps=3)
    for first in (0, 3):
        stacked = jax.tree.map(lambda *xs: np.stack(xs), *batches[first : first + 3])
        state, counted, totals = take(
            state, counted, sharding.put_batch(stacked, mesh, stacked=True), None
        )
    assert int(state.step) == 6
    assert_trees_close(state, single.state, rtol=1e-5, atol=1e-6)
    assert_trees_close(counted, single.metrics, rtol=1e-5, atol=1e-4)
    assert_trees_close(totals, single.totals, rtol=1e-5, atol=1e-4)


def test_state_and_metrics_are_donated_and_the_totals_outlive_them():
    recipe = make_recipe(options={"momentum": 0.9}, ema_decay=0.9)
    mesh = sharding.create_mesh(1)
    state, counted = jax.device_put(start(recipe), sharding.replicated(mesh))
    shardings = sharding.state_shardings(state, mesh, shard_params=False)
    take = step.compile_train_step(recipe, shardings, sharding.replicated(mesh))
    batch = sharding.put_batch(make_batch(), mesh)
    new_state, new_counted, totals = take(state, counted, batch, None)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state, counted)))
    take(new_state, new_counted, batch, None)
    assert int(totals.metrics.count) == 16


@pytest.mark.usefixtures("x64")
def test_training_steps_are_those_of_pytorch():
    torch = pytest.importorskip("torch")
    import reference_torch  # it needs torch at its head

    model = create_model("lenet", CLASSES, **FLOAT64)
    recipe = make_recipe(
        model,
        size=28,
        loss={"class_weights": CLASS_WEIGHTS, "label_smoothing": 0.1},
        options={"momentum": 0.9, "nesterov": True, "weight_decay": 5e-3},
        dtype=jnp.dtype("float64"),
    )
    batches = [make_batch(seed, size=28) for seed in range(3)]
    state, _ = start(recipe)
    twin = reference_torch.TwoConvs(CLASSES, 6, 16, 5, 256).double()
    reference_torch.load(twin, {"params": state.params})
    optimizer = torch.optim.SGD(
        twin.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-3
    )
    losses = []
    for batch in batches:
        images = (torch.from_numpy(batch.image).double() / 255 - 0.4) / 0.3
        loss = torch.nn.functional.cross_entropy(
            twin(images.permute(0, 3, 1, 2)),
            torch.from_numpy(batch.label).long(),
            weight=torch.from_numpy(CLASS_WEIGHTS),
            label_smoothing=0.1,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append((loss.item(), CLASS_WEIGHTS[batch.label].sum()))
    result = run(recipe, batches)
    ours = reference_torch.TwoConvs(CLASSES, 6, 16, 5, 256).double()
    reference_torch.load(ours, {"params": result.state.params})
    for (name, a), b in zip(ours.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=name)
    values, weights = np.array(losses).T
    mean = (values * weights).sum() / weights.sum()
    np.testing.assert_allclose(
        metrics.compute(jax.device_get(result.metrics))["loss"], mean, rtol=1e-12
    )
