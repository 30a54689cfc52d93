"""Optimizers and schedules against PyTorch over several steps with the same gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flaxcls import optimizers
from flaxcls.errors import InputError

STEPS_PER_EPOCH, EPOCHS = 5, 8


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    jax.config.update("jax_enable_x64", request.param == "float64")
    yield request.param
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")


def _trajectories(seed=0, steps=10):
    """Parameters of two arrays and a gradient of each for every step."""
    rng = np.random.default_rng(seed)
    params = {"kernel": rng.normal(size=(7, 5)), "bias": rng.normal(size=5)}
    scales = rng.exponential(1, steps)
    gradients = [{k: s * rng.normal(size=v.shape) for k, v in params.items()} for s in scales]
    return params, gradients


def _run_jax(optimizer, params, gradients, dtype):
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for gradient in gradients:
        params, state = step(params, state, jax.tree.map(lambda x: jnp.asarray(x, dtype), gradient))
    return params, state


def _run_torch(torch, create, params, gradients, dtype, *, clip_norm=None, create_scheduler=None):
    tensors = {
        k: torch.nn.Parameter(torch.tensor(v, dtype=getattr(torch, dtype)))
        for k, v in params.items()
    }
    optimizer = create(tensors.values())
    scheduler = create_scheduler(optimizer) if create_scheduler else None
    for gradient in gradients:
        for k, tensor in tensors.items():
            tensor.grad = torch.tensor(gradient[k], dtype=tensor.dtype)
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(tensors.values(), clip_norm)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return {k: tensor.detach().numpy() for k, tensor in tensors.items()}


def _assert_close(params, reference, dtype):
    tolerance = 1e-6 if dtype == "float32" else 1e-10
    for name, value in reference.items():
        assert params[name].dtype == dtype
        np.testing.assert_allclose(params[name], value, rtol=tolerance, atol=tolerance)


def _constant(learning_rate):
    return optimizers.create_schedule("constant", learning_rate, steps_per_epoch=1, epochs=1)


# Optimizer, its options here, learning rate; PyTorch's options are the same but for their names.
CASES = [
    ("sgd", {}, 0.1),
    ("sgd", {"weight_decay": 5e-2}, 0.1),
    ("sgd", {"momentum": 0.9}, 0.1),
    ("sgd", {"momentum": 0.9, "weight_decay": 5e-2}, 0.1),
    ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-2}, 0.1),
    ("adam", {}, 1e-2),
    ("adam", {"weight_decay": 0.1}, 1e-2),
    ("adam", {"b1": 0.5, "b2": 0.9, "eps": 1e-3, "weight_decay": 0.1}, 1e-2),
    ("adamw", {}, 1e-2),
    ("adamw", {"weight_decay": 0.1}, 1e-2),
    ("adamw", {"b1": 0.8, "b2": 0.99, "eps": 1e-3, "weight_decay": 1.0}, 1e-2),
    ("rmsprop", {}, 1e-2),
    ("rmsprop", {"decay": 0.9, "eps": 1e-2}, 1e-2),
    ("rmsprop", {"weight_decay": 0.1}, 1e-2),
    ("rmsprop", {"momentum": 0.9, "weight_decay": 0.1}, 1e-2),
    ("rmsprop", {"centered": True}, 1e-2),
    ("rmsprop", {"centered": True, "momentum": 0.9, "weight_decay": 0.1, "decay": 0.9}, 1e-2),
]


def _torch_optimizer(torch, name, options, learning_rate):
    kind = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "rmsprop": "RMSprop"}[name]
    given = {"weight_decay": 0.0} | options
    if name in ("adam", "adamw"):
        given["betas"] = (given.pop("b1", 0.9), given.pop("b2", 0.999))
    if "decay" in given:
        given["alpha"] = given.pop("decay")
    return lambda params: getattr(torch.optim, kind)(params, lr=learning_rate, **given)


@pytest.mark.parametrize(("name", "options", "learning_rate"), CASES)
def test_ten_steps_equal_pytorchs(torch, dtype, name, options, learning_rate):
    params, gradients = _trajectories()
    optimizer = optimizers.create_optimizer(name, _constant(learning_rate), **options)
    ours, _ = _run_jax(optimizer, params, gradients, dtype)
    create = _torch_optimizer(torch, name, options, learning_rate)
    _assert_close(ours, _run_torch(torch, create, params, gradients, dtype), dtype)


@pytest.mark.parametrize("name", list(optimizers.OPTIMIZERS))
def test_clipping_decay_and_a_schedule_together_equal_pytorchs(torch, dtype, name):
    params, gradients = _trajectories()
    options, clip_norm = {"weight_decay": 0.1}, 4.0
    norms = [math.sqrt(sum(np.sum(g**2) for g in tree.values())) for tree in gradients]
    assert min(norms) < clip_norm < max(norms)
    schedule = optimizers.create_schedule(
        "step", 1e-2, steps_per_epoch=1, epochs=10, step_epochs=3, gamma=0.5
    )
    optimizer = optimizers.create_optimizer(name, schedule, clip_norm=clip_norm, **options)
    ours, _ = _run_jax(optimizer, params, gradients, dtype)
    reference = _run_torch(
        torch,
        _torch_optimizer(torch, name, options, 1e-2),
        params,
        gradients,
        dtype,
        clip_norm=clip_norm,
        create_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5),
    )
    _assert_close(ours, reference, dtype)


@pytest.mark.parametrize("clip_norm", [1e-3, 1.0, 1e3])
def test_clipped_gradients_equal_pytorchs(torch, clip_norm):
    _, (gradient,) = _trajectories(steps=1)
    clip = optimizers.clip_by_norm(clip_norm)
    clipped, _ = clip.update(jax.tree.map(jnp.float32, gradient), clip.init(gradient))
    zeros = {k: np.zeros_like(v) for k, v in gradient.items()}
    reference = _run_torch(
        torch,
        lambda params: torch.optim.SGD(params, lr=1.0),
        zeros,
        [gradient],
        "float32",
        clip_norm=clip_norm,
    )
    for name, value in reference.items():
        np.testing.assert_allclose(clipped[name], -value, rtol=1e-6)


def test_a_zero_gradient_is_clipped_to_zero_and_not_to_nan():
    clip = optimizers.clip_by_norm(1.0)
    clipped, _ = clip.update({"bias": jnp.zeros(3)}, clip.init({}))
    np.testing.assert_array_equal(clipped["bias"], 0)


def test_centered_rmsprop_survives_a_gradient_that_stays_the_same():
    params = {"kernel": np.zeros(100)}
    gradient = {"kernel": np.random.default_rng(0).normal(size=100)}
    optimizer = optimizers.create_optimizer("rmsprop", _constant(1e-3), centered=True, decay=0.9)
    ours, _ = _run_jax(optimizer, params, [gradient] * 300, "float32")
    assert np.all(np.isfinite(ours["kernel"]))


@pytest.mark.parametrize(("name", "options", "learning_rate"), CASES)
def test_the_state_has_the_dtype_of_the_parameters(name, options, learning_rate):
    params, gradients = _trajectories(steps=2)
    optimizer = optimizers.create_optimizer(
        name, _constant(learning_rate), clip_norm=1.0, **options
    )
    ours, state = _run_jax(optimizer, params, gradients, "bfloat16")
    for leaf in jax.tree.leaves((ours, state)):
        assert leaf.dtype == (jnp.bfloat16 if leaf.ndim else jnp.int32)


def _rates(name, learning_rate=0.1, steps=STEPS_PER_EPOCH * EPOCHS, **options):
    schedule = optimizers.create_schedule(
        name, learning_rate, steps_per_epoch=STEPS_PER_EPOCH, epochs=EPOCHS, **options
    )
    return np.array([schedule(step) for step in range(steps)])


def _torch_rates(torch, create, *, by_epoch=False, learning_rate=0.1):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=learning_rate)
    scheduler = create(optimizer)
    rates = []
    for step in range(1, STEPS_PER_EPOCH * EPOCHS + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if not by_epoch or step % STEPS_PER_EPOCH == 0:
            scheduler.step()
    return np.array(rates)


TOTAL = STEPS_PER_EPOCH * EPOCHS
SCHEDULES = [
    ("constant", {}, "ConstantLR", {"factor": 1.0}, True),
    ("plateau", {}, "ConstantLR", {"factor": 1.0}, True),
    ("step", {"step_epochs": 3, "gamma": 0.3}, "StepLR", {"step_size": 3, "gamma": 0.3}, True),
    (
        "multi_step",
        {"milestones": (2, 3, 7), "gamma": 0.5},
        "MultiStepLR",
        {"milestones": [2, 3, 7], "gamma": 0.5},
        True,
    ),
    ("cosine", {}, "CosineAnnealingLR", {"T_max": TOTAL}, False),
    (
        "cosine",
        {"end_fraction": 0.1},
        "CosineAnnealingLR",
        {"T_max": TOTAL, "eta_min": 0.01},
        False,
    ),
    (
        "linear",
        {"end_fraction": 0.05},
        "LinearLR",
        {"start_factor": 1.0, "end_factor": 0.05, "total_iters": TOTAL},
        False,
    ),
    ("polynomial", {"power": 2.5}, "PolynomialLR", {"total_iters": TOTAL, "power": 2.5}, False),
    ("one_cycle", {}, "OneCycleLR", {"max_lr": 0.1, "total_steps": TOTAL}, False),
    (
        "one_cycle",
        {"pct_start": 0.11, "div_factor": 5.0, "final_div_factor": 50.0},
        "OneCycleLR",
        {
            "max_lr": 0.1,
            "total_steps": TOTAL,
            "pct_start": 0.11,
            "div_factor": 5.0,
            "final_div_factor": 50.0,
        },
        False,
    ),
    (
        "one_cycle",
        {"pct_start": 0.0},
        "OneCycleLR",
        {"max_lr": 0.1, "total_steps": TOTAL, "pct_start": 0.0},
        False,
    ),
]


@pytest.mark.parametrize(("name", "options", "kind", "torch_options", "by_epoch"), SCHEDULES)
def test_schedules_equal_pytorchs(torch, dtype, name, options, kind, torch_options, by_epoch):
    create = getattr(torch.optim.lr_scheduler, kind)
    if kind == "OneCycleLR":
        torch_options = torch_options | {"cycle_momentum": False}
    expected = _torch_rates(torch, lambda o: create(o, **torch_options), by_epoch=by_epoch)
    rates = _rates(name, **options)
    assert rates.dtype == dtype
    # float32 counts cancel where a schedule nears zero, hence a share of the first rate.
    tolerance = 1e-6 if dtype == "float32" else 1e-12
    np.testing.assert_allclose(rates, expected, rtol=tolerance, atol=tolerance * 0.1)


def test_every_schedule_is_compared_with_pytorchs():
    assert {case[0] for case in SCHEDULES} == set(optimizers.SCHEDULES)


@pytest.mark.parametrize("warmup_epochs", [1.0, 2.5])
def test_warm_up_and_cosine_equal_pytorchs_sequence(torch, warmup_epochs):
    warmup = round(warmup_epochs * STEPS_PER_EPOCH)
    scheduler = torch.optim.lr_scheduler

    def create(optimizer):
        return scheduler.SequentialLR(
            optimizer,
            [
                scheduler.LinearLR(optimizer, optimizers.WARMUP_START, total_iters=warmup),
                scheduler.CosineAnnealingLR(optimizer, TOTAL - warmup),
            ],
            [warmup],
        )

    expected = _torch_rates(torch, create)
    rates = _rates("cosine", warmup_epochs=warmup_epochs)
    np.testing.assert_allclose(rates, expected, rtol=1e-6, atol=1e-8)


def test_warm_up_leaves_the_borders_of_epochs_where_they_are():
    options = {"milestones": (1, 4), "gamma": 0.1}
    plain = _rates("multi_step", **options)
    warm = _rates("multi_step", warmup_epochs=2.5, **options)
    ramp = np.minimum(0.01 + 0.99 * np.arange(TOTAL) / round(2.5 * STEPS_PER_EPOCH), 1)
    np.testing.assert_allclose(warm, plain * ramp, rtol=1e-6)


@pytest.mark.parametrize(("name", "options"), [case[:2] for case in SCHEDULES])
def test_every_schedule_warms_up_to_its_start_and_holds_its_end(name, options):
    warm = _rates(name, warmup_epochs=1, steps=2 * TOTAL, **options)
    assert warm[0] == pytest.approx(0.01 * warm[STEPS_PER_EPOCH], rel=1e-5)
    assert np.all(np.isfinite(warm))
    assert np.all(warm >= 0)
    if optimizers.schedule_depends_on_epochs(name):
        assert np.all(warm[TOTAL:] == warm[TOTAL])


def test_schedules_that_do_not_depend_on_the_number_of_epochs_are_known():
    options = {"step": {"step_epochs": 2}, "multi_step": {"milestones": (3,)}}
    for name in optimizers.SCHEDULES:
        short, long = (
            optimizers.create_schedule(
                name, 0.1, steps_per_epoch=5, epochs=epochs, **options.get(name, {})
            )
            for epochs in (4, 8)
        )
        changed = any(short(step) != long(step) for step in range(20))
        assert optimizers.schedule_depends_on_epochs(name) == changed


def _history(seed):
    rng = np.random.default_rng(seed)
    return (1 / np.arange(1, 61) + rng.normal(0, 0.03, 60)).tolist()


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"factor": 0.5, "patience": 0, "min_delta": 0.0},
        {"factor": 0.5, "patience": 2, "min_delta": 0.01, "cooldown": 3},
        {"factor": 0.1, "patience": 1, "cooldown": 1, "min_scale": 0.005},
    ],
)
def test_plateau_scale_equals_reduce_lr_on_plateau_at_every_epoch(torch, mode, options):
    translated = {
        {"min_delta": "threshold", "min_scale": "min_lr"}.get(k, k): v for k, v in options.items()
    }
    for seed in range(3):
        values = _history(seed)
        if mode == "max":
            values = [-value for value in values]
        values[20] = float("nan")
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, mode=mode, threshold_mode="abs", eps=0.0, **translated
        )
        scales = []
        for epoch, value in enumerate(values):
            assert optimizers.plateau_scale(values[:epoch], mode=mode, **options) == pytest.approx(
                optimizer.param_groups[0]["lr"], rel=1e-12
            )
            scheduler.step(value)
            scales.append(optimizer.param_groups[0]["lr"])
        assert scales[-1] < 1


@pytest.mark.parametrize("learning_rate", [float("nan"), float("inf"), 0.0, -0.1])
def test_impossible_learning_rates_are_refused(learning_rate):
    with pytest.raises(InputError, match="learning_rate"):
        _rates("constant", learning_rate)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cosin", {}, "did you mean 'cosine'"),
        ("cosine", {"end_fractoin": 0.1}, "did you mean 'end_fraction'"),
        ("cosine", {"gamma": 0.1}, "schedule.gamma: not used by 'cosine'"),
        ("cosine", {"end_fraction": 1.5}, "end_fraction: 1.5"),
        ("cosine", {"warmup_epochs": 9}, "longer than the 8 epochs"),
        ("cosine", {"warmup_epochs": float("nan")}, "warmup_epochs: nan"),
        ("step", {}, "step_epochs: 'step' needs it"),
        ("step", {"step_epochs": 0}, "step_epochs: 0"),
        ("step", {"step_epochs": 1, "gamma": 0.0}, "gamma: 0.0"),
        ("multi_step", {"milestones": ()}, "milestones"),
        ("multi_step", {"milestones": (1.5,)}, "milestones"),
        ("polynomial", {"power": 0.0}, "power"),
        ("one_cycle", {"pct_start": 1.0}, "pct_start"),
        ("one_cycle", {"div_factor": 0.5}, "div_factor"),
        ("plateau", {"factor": 1.0}, "factor"),
        ("plateau", {"patience": -1}, "patience"),
    ],
)
def test_impossible_schedules_are_refused(name, options, message):
    with pytest.raises(InputError, match=message):
        _rates(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rmspropp", {}, "did you mean 'rmsprop'"),
        ("adam", {"momentum": 0.9}, "optimizer.momentum: not used by 'adam'"),
        ("sgd", {"momentom": 0.9}, "did you mean 'momentum'"),
        ("sgd", {"momentum": 1.0}, "momentum: 1.0"),
        ("sgd", {"nesterov": True}, "needs momentum"),
        ("sgd", {"weight_decay": -1.0}, "weight_decay: -1.0"),
        ("sgd", {"weight_decay": float("nan")}, "weight_decay: nan"),
        ("sgd", {"clip_norm": float("inf")}, "clip_norm: inf"),
        ("adam", {"b2": 1.0}, "b2: 1.0"),
        ("adam", {"eps": 0.0}, "eps: 0.0"),
        ("rmsprop", {"decay": -0.1}, "decay: -0.1"),
    ],
)
def test_impossible_optimizers_are_refused(name, options, message):
    with pytest.raises(InputError, match=message):
        optimizers.create_optimizer(name, _constant(0.1), **options)


def test_a_plateau_needs_a_direction():
    with pytest.raises(InputError, match="choose one of min, max"):
        optimizers.plateau_scale([1.0], mode="maximum")
