"""Optimizers and learning-rate schedules with PyTorch's semantics, built on Optax.

An option of an optimizer or a schedule is a keyword argument of its function in `OPTIMIZERS` or
`SCHEDULES`; to add one, write such a function and enter it there.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flaxcls.errors import InputError, did_you_mean

WARMUP_START = 0.01  # of the learning rate, at the first step of a warm-up

# The learning rate divided by its base value, as a function of a count of epochs or of steps.
Factor = Callable[[jax.Array], jax.Array]


def create_optimizer(
    name: str,
    schedule: optax.Schedule,
    *,
    clip_norm: float = 0.0,
    **options: Any,
) -> optax.GradientTransformation:
    """Returns an optimizer whose updates are to be added to the parameters.

    The gradient is clipped, the optimizer's rule applied, and the result multiplied by minus the
    learning rate. The state's arrays take the dtypes of the parameters.

    Args:
      name: one of `OPTIMIZERS`.
      schedule: learning rate at a step, as `create_schedule` returns it.
      clip_norm: the gradient's global norm is scaled down to this; 0: never.
      **options: of the function in `OPTIMIZERS`.

    Raises:
      InputError: the name or an option is unknown, or an option is out of its range.
    """
    if name not in OPTIMIZERS:
        raise InputError(f"optimizer.name: unknown {name!r}; {did_you_mean(name, OPTIMIZERS)}")
    _check_options("optimizer", name, OPTIMIZERS[name], options)
    _check_range("optimizer.clip_norm", clip_norm, 0)
    return optax.chain(
        clip_by_norm(clip_norm) if clip_norm else optax.identity(),
        OPTIMIZERS[name](**options),
        optax.scale_by_learning_rate(schedule),
    )


def sgd(
    *, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """The direction of `torch.optim.SGD`: L2 in the gradient, buffer = momentum * buffer + g."""
    _check_range("optimizer.momentum", momentum, 0, 1)
    _check_range("optimizer.weight_decay", weight_decay, 0)
    if nesterov and not momentum:
        raise InputError("optimizer.nesterov: needs momentum; set optimizer.momentum, 0.9 say")
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.trace(momentum, nesterov) if momentum else optax.identity(),
    )


def adam(
    *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """The direction of `torch.optim.Adam` (Kingma and Ba 2015): L2 in the gradient."""
    _check_adam(b1, b2, eps, weight_decay)
    return optax.chain(
        optax.add_decayed_weights(weight_decay), optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    )


def adamw(
    *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """The direction of `torch.optim.AdamW` (Loshchilov and Hutter 2019): decoupled decay."""
    _check_adam(b1, b2, eps, weight_decay)
    return optax.chain(
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps), optax.add_decayed_weights(weight_decay)
    )


def rmsprop(
    *,
    decay: float = 0.99,
    eps: float = 1e-8,
    momentum: float = 0.0,
    centered: bool = False,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """The direction of `torch.optim.RMSprop`: L2 in the gradient, eps outside the root.

    Args:
      decay: of the running mean square, PyTorch's `alpha`.
      eps: added to the root.
      momentum: of a buffer of g / (root + eps).
      centered: subtract the square of the running mean under the root.
      weight_decay: times the parameters, added to the gradient.
    """
    _check_range("optimizer.decay", decay, 0, 1)
    _check_eps(eps)
    _check_range("optimizer.momentum", momentum, 0, 1)
    _check_range("optimizer.weight_decay", weight_decay, 0)
    if centered:
        scale = _scale_by_centered_rms(decay, eps)
    else:
        scale = optax.scale_by_rms(decay, eps, eps_in_sqrt=False)
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        scale,
        optax.trace(momentum) if momentum else optax.identity(),
    )


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": sgd,
    "adam": adam,
    "adamw": adamw,
    "rmsprop": rmsprop,
}


def clip_by_norm(max_norm: float) -> optax.GradientTransformation:
    """`torch.nn.utils.clip_grad_norm_`: the gradient times min(1, max_norm / (norm + 1e-6)).

    The norm is taken over all arrays, in at least float32.
    """

    def clip(updates: optax.Updates, params: optax.Params | None = None) -> optax.Updates:
        del params
        norm = optax.tree.norm(
            jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), updates)
        )
        scale = jnp.minimum(1, max_norm / (norm + 1e-6))
        return jax.tree.map(lambda g: (g * scale).astype(g.dtype), updates)

    return optax.stateless(clip)


class CenteredRmsState(NamedTuple):
    """Running mean and mean square of the gradient, trees like the parameters."""

    mean: optax.Updates
    square: optax.Updates


def _scale_by_centered_rms(decay: float, eps: float) -> optax.GradientTransformation:
    """g / (sqrt(max(mean(g^2) - mean(g)^2, 0)) + eps).

    `optax.scale_by_stddev` leaves out the max, and a gradient that stays constant turns to NaN
    as the difference rounds to less than 0.
    """

    def init(params: optax.Params) -> CenteredRmsState:
        return CenteredRmsState(
            jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params)
        )

    def update(
        updates: optax.Updates, state: CenteredRmsState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, CenteredRmsState]:
        del params
        mean = optax.tree.update_moment(updates, state.mean, decay, 1)
        square = optax.tree.update_moment(updates, state.square, decay, 2)

        def scaled(g: jax.Array, m: jax.Array, s: jax.Array) -> jax.Array:
            return g / (jnp.sqrt(jnp.maximum(s - m * m, 0)) + eps)

        return jax.tree.map(scaled, updates, mean, square), CenteredRmsState(mean, square)

    return optax.GradientTransformation(init, update)


def create_schedule(
    name: str,
    learning_rate: float,
    *,
    steps_per_epoch: int,
    epochs: int,
    warmup_epochs: float = 0.0,
    **options: Any,
) -> optax.Schedule:
    """Returns the learning rate as a function of the number of steps taken, an int ().

    During warm-up the schedule is multiplied by a factor that grows linearly from `WARMUP_START`
    at step 0 to 1 at step round(warmup_epochs * steps_per_epoch). Schedules that change at the
    borders of epochs (`EPOCH_SCHEDULES`) count epochs from the start of training; the others
    (`SPAN_SCHEDULES`) stand at their start during warm-up, spread over the steps that remain, and
    stay at their end afterwards. The result has JAX's default float dtype.

    Args:
      name: one of `SCHEDULES`.
      learning_rate: the base value, which the schedule multiplies.
      steps_per_epoch: optimizer steps.
      epochs: of the whole training.
      warmup_epochs: length of the warm-up; 0: none.
      **options: of the function in `SCHEDULES`.

    Raises:
      InputError: the name or an option is unknown, or a value is out of its range.
    """
    if name not in SCHEDULES:
        raise InputError(f"schedule.name: unknown {name!r}; {did_you_mean(name, SCHEDULES)}")
    _check_options("schedule", name, SCHEDULES[name], options)
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise InputError(
            f"optimizer.learning_rate: {learning_rate} is out of range; "
            "it must be finite and greater than 0"
        )
    _check_range("steps_per_epoch", steps_per_epoch, 1)
    _check_range("train.epochs", epochs, 1)
    _check_range("schedule.warmup_epochs", warmup_epochs, 0)
    if warmup_epochs > epochs:
        raise InputError(
            f"schedule.warmup_epochs: {warmup_epochs} is longer than the {epochs} epochs of "
            "training; shorten the warm-up"
        )
    warmup = round(warmup_epochs * steps_per_epoch)

    if name in EPOCH_SCHEDULES:
        by_epoch = EPOCH_SCHEDULES[name](**options)

        def factor(count: jax.Array) -> jax.Array:
            return by_epoch(count // steps_per_epoch)
    else:
        steps = max(steps_per_epoch * epochs - warmup, 1)
        by_step = SPAN_SCHEDULES[name](steps, **options)

        def factor(count: jax.Array) -> jax.Array:
            return by_step(_as_float(jnp.clip(count - warmup, 0, steps)))

    def schedule(count: Any) -> jax.Array:
        count = jnp.asarray(count)
        rate = learning_rate * factor(count)
        if warmup:
            share = jnp.minimum(_as_float(count) / warmup, 1)
            rate *= WARMUP_START + (1 - WARMUP_START) * share
        return rate

    return schedule


def constant() -> Factor:
    """1."""
    return lambda epoch: jnp.ones((), jnp.result_type(float))


def step(*, step_epochs: int, gamma: float = 0.1) -> Factor:
    """PyTorch's `StepLR`: gamma to the number of whole `step_epochs` gone by."""
    _check_range("schedule.step_epochs", step_epochs, 1)
    _check_gamma(gamma)
    return lambda epoch: jnp.power(gamma, _as_float(epoch // step_epochs))


def multi_step(*, milestones: Sequence[int], gamma: float = 0.1) -> Factor:
    """PyTorch's `MultiStepLR`: gamma to the number of milestones, in epochs, reached."""
    borders = np.asarray(milestones)
    if borders.ndim != 1 or not borders.size or borders.dtype.kind != "i" or np.any(borders < 1):
        raise InputError(
            f"schedule.milestones: {milestones} must name the epochs, whole numbers from 1 on, "
            "after which the learning rate changes, as in (30, 60)"
        )
    _check_gamma(gamma)
    return lambda epoch: jnp.power(gamma, _as_float(jnp.sum(epoch >= borders)))


def plateau(
    *,
    factor: float = 0.1,
    patience: int = 10,
    min_delta: float = 1e-4,
    cooldown: int = 0,
    min_scale: float = 0.0,
) -> Factor:
    """1: what `plateau_scale` makes of these options multiplies the learning rate elsewhere."""
    _check_plateau(factor, patience, min_delta, cooldown, min_scale)
    return constant()


def cosine(steps: int, *, end_fraction: float = 0.0) -> Factor:
    """PyTorch's `CosineAnnealingLR` over `steps` (Loshchilov and Hutter 2017, eq. 5)."""
    _check_range("schedule.end_fraction", end_fraction, 0, 1)
    return lambda count: (
        end_fraction + (1 - end_fraction) * (1 + jnp.cos(jnp.pi * count / steps)) / 2
    )


def linear(steps: int, *, end_fraction: float = 0.0) -> Factor:
    """PyTorch's `LinearLR` from 1 to `end_fraction`."""
    return polynomial(steps, end_fraction=end_fraction)


def polynomial(steps: int, *, power: float = 1.0, end_fraction: float = 0.0) -> Factor:
    """PyTorch's `PolynomialLR`, (1 - count / steps)^power, brought to end at `end_fraction`."""
    if not (math.isfinite(power) and power > 0):
        raise InputError(f"schedule.power: {power} is out of range; it must be greater than 0")
    _check_range("schedule.end_fraction", end_fraction, 0, 1)
    return lambda count: end_fraction + (1 - end_fraction) * jnp.power(1 - count / steps, power)


def one_cycle(
    steps: int,
    *,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
) -> Factor:
    """PyTorch's `OneCycleLR` (Smith and Topin 2018), cosine, of the learning rate only.

    Args:
      steps: of the whole cycle.
      pct_start: share of the steps that the learning rate rises for.
      div_factor: the cycle starts at 1 / div_factor ...
      final_div_factor: ... and ends at 1 / (div_factor * final_div_factor).
    """
    _check_range("schedule.pct_start", pct_start, 0, 1)
    _check_range("schedule.div_factor", div_factor, 1)
    _check_range("schedule.final_div_factor", final_div_factor, 1)
    peak, end = pct_start * steps - 1, steps - 1
    start_factor = 1 / div_factor
    end_factor = start_factor / final_div_factor

    def factor(count: jax.Array) -> jax.Array:
        rising = _anneal(start_factor, 1.0, count / peak) if peak > 0 else 1.0
        falling = _anneal(1.0, end_factor, jnp.minimum((count - peak) / (end - peak), 1))
        return jnp.where(count <= peak, rising, falling)

    return factor


def _anneal(start: float, end: float, share: jax.Array) -> jax.Array:
    return end + (start - end) / 2 * (1 + jnp.cos(jnp.pi * share))


# Functions of their options that return the factor at an epoch ...
EPOCH_SCHEDULES: dict[str, Callable[..., Factor]] = {
    "constant": constant,
    "step": step,
    "multi_step": multi_step,
    "plateau": plateau,
}
# ... and functions of a number of steps and their options, that at one of these steps.
SPAN_SCHEDULES: dict[str, Callable[..., Factor]] = {
    "cosine": cosine,
    "linear": linear,
    "polynomial": polynomial,
    "one_cycle": one_cycle,
}
SCHEDULES = EPOCH_SCHEDULES | SPAN_SCHEDULES


def schedule_depends_on_epochs(name: str) -> bool:
    """Returns whether training for more epochs changes the learning rates of the first ones."""
    return name in SPAN_SCHEDULES


def plateau_scale(
    values: Sequence[float],
    *,
    mode: str,
    factor: float = 0.1,
    patience: int = 10,
    min_delta: float = 1e-4,
    cooldown: int = 0,
    min_scale: float = 0.0,
) -> float:
    """Returns the factor of the learning rate after a history of a metric, 1.0 at first.

    As PyTorch's `ReduceLROnPlateau` with `threshold_mode="abs"`, `threshold=min_delta` and
    `eps=0`: min_delta is absolute, as in early stopping. NaN is never an improvement.

    Args:
      values: the metric after each epoch so far.
      mode: `min` where smaller is better, `max` where larger is.
      factor: what the scale is multiplied by.
      patience: epochs without improvement that are let pass; the next one reduces.
      min_delta: an improvement is more than this.
      cooldown: epochs after a reduction that do not count as bad.
      min_scale: the scale stays at or above this.

    Raises:
      InputError: an option is out of its range.
    """
    if mode not in ("min", "max"):
        raise InputError(f"plateau mode: unknown {mode!r}; {did_you_mean(mode, ('min', 'max'))}")
    _check_plateau(factor, patience, min_delta, cooldown, min_scale)
    scale, best, bad_epochs, cooling = 1.0, math.inf, 0, 0
    for value in values:
        loss = value if mode == "min" else -value
        if loss < best - min_delta:
            best, bad_epochs = loss, 0
        else:
            bad_epochs += 1
        if cooling:
            cooling, bad_epochs = cooling - 1, 0
        if bad_epochs > patience:
            scale, bad_epochs, cooling = max(scale * factor, min_scale), 0, cooldown
    return scale


def _as_float(count: jax.Array) -> jax.Array:
    return count.astype(jnp.result_type(float))


def _check_adam(b1: float, b2: float, eps: float, weight_decay: float) -> None:
    _check_range("optimizer.b1", b1, 0, 1)
    _check_range("optimizer.b2", b2, 0, 1)
    _check_eps(eps)
    _check_range("optimizer.weight_decay", weight_decay, 0)


def _check_eps(eps: float) -> None:
    if not (math.isfinite(eps) and eps > 0):
        raise InputError(f"optimizer.eps: {eps} is out of range; it must be greater than 0")


def _check_gamma(gamma: float) -> None:
    if not (math.isfinite(gamma) and gamma > 0):
        raise InputError(f"schedule.gamma: {gamma} is out of range; it must be greater than 0")


def _check_plateau(
    factor: float, patience: int, min_delta: float, cooldown: int, min_scale: float
) -> None:
    _check_range("schedule.factor", factor, 0, 1)
    _check_range("schedule.patience", patience, 0)
    _check_range("schedule.min_delta", min_delta, 0)
    _check_range("schedule.cooldown", cooldown, 0)
    _check_range("schedule.min_scale", min_scale, 0, 1)


def _check_range(name: str, value: float, low: float, below: float = math.inf) -> None:
    if not low <= value < below:
        upper = "finite" if below == math.inf else f"less than {below:g}"
        raise InputError(
            f"{name}: {value} is out of range; it must be at least {low:g} and {upper}"
        )


def _check_options(
    group: str, name: str, function: Callable[..., Any], options: dict[str, Any]
) -> None:
    parameters = inspect.signature(function).parameters.values()
    known = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    for option in options:
        if option not in known:
            remedy = did_you_mean(option, known) if known else "remove it"
            raise InputError(f"{group}.{option}: not used by {name!r}; {remedy}")
    for option, default in known.items():
        if default is inspect.Parameter.empty and option not in options:
            raise InputError(f"{group}.{option}: {name!r} needs it; set it")
