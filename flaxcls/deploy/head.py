"""The layers that give a model's logits: what they see, and how they learn one class more.

Every model here ends in one dense layer, or in the product of two. What enters them is computed
once an image, so that to learn from it takes no further pass through the network.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from flaxcls import ops
from flaxcls.augment import Augmentation, augment
from flaxcls.batch import Batch, preprocess
from flaxcls.deploy.trained import TrainedModel
from flaxcls.errors import InputError
from flaxcls.pretrained.heads import class_layers

BATCH = 32
# Of a prototype: how far the scatter of the features is drawn towards a sphere. Of 0.003 to 0.9,
# the best for Fashion-MNIST with a class held back (benchmarks/teach_class.py).
SHRINKAGE = 0.1
# Parts of the exemplars, each of which is judged by a prototype that the others made.
FOLDS = 5
# The share of the examples whose needs count: one photo unlike the others should not.
MOST_OF_THEM = 0.9
# Of finetuning: Adam's steps, images a step, and its first learning rate, which falls to 0.
STEPS, IMAGES_A_STEP, LEARNING_RATE = 300, 512, 1e-3
# Parts of the exemplars that are left out in turn to judge it; reports of progress.
PARTS, REPORTS = 3, 10
# How often the new class is drawn for each time that an old one is, and what the old logits weigh
# against the labels. Without them (1, 0) the new Sneaker of benchmarks/teach_class.py is found in
# 65 % of its test images at a cost of 1.7 points to the old classes, with them in 84 % at 1.4.
SHARE, MEMORY = 4.0, 1.0

Path = tuple[str, ...]


class Layer(NamedTuple):
    """A dense layer.

    Attributes:
      kernel: float (F, K).
      bias: float (K,).
    """

    kernel: Any
    bias: Any


class Seen(NamedTuple):
    """What the head sees of N images.

    Attributes:
      features: of each of its layers, float (N, F).
      logits: float (N, K).
    """

    features: tuple[Any, ...]
    logits: Any


@dataclasses.dataclass(frozen=True)
class Head:
    """The dense layers whose product are the logits; mostly there is one.

    Attributes:
      paths: where they are in the model.
      layers: their parameters.
    """

    paths: tuple[Path, ...]
    layers: tuple[Layer, ...]


def head_of(trained: TrainedModel) -> Head:
    """Returns the layers that have an output for each class.

    Raises:
      InputError: there are none, or they are no dense layers with a bias.
    """
    p = trained.preprocess
    arrays = flatten_dict(trained.variables)
    paths = class_layers(trained.model, arrays, (p.size, p.size, p.channels))
    layers = []
    for path in paths:
        kernel, bias = (arrays.get(("params", *path, name)) for name in ("kernel", "bias"))
        if kernel is None or bias is None or kernel.ndim != 2:
            raise _strange(trained)
        layers.append(Layer(np.asarray(kernel), np.asarray(bias)))
    if not layers:
        raise _strange(trained)
    return Head(paths, tuple(layers))


def _strange(trained: TrainedModel) -> InputError:
    return InputError(
        f"model {trained.config.model.name}: its logits are not those of a dense layer with a bias "
        "or the product of two, so that it cannot be taught a class; train it anew with that class"
    )


def head_logits(layers: Sequence[Layer], features: Sequence[Any]) -> Any:
    """Features (N, F) of each layer -> logits (N, K), the product of what the layers give."""
    product: Any = 1
    for (kernel, bias), x in zip(layers, features, strict=True):
        product = product * (x @ kernel + bias)
    return product


class Eye:
    """Shows images to a model and returns what its head sees; compiled for one batch size.

    Args:
      trained: the model.
      head: its own.
    """

    def __init__(self, trained: TrainedModel, head: Head):
        self._trained = trained
        self._head = head
        self._variables = jax.device_put(trained.variables)
        self._step = jax.jit(
            self._see, static_argnames="augmentation", compiler_options=ops.compiler_options()
        )

    def __call__(
        self,
        images: np.ndarray,
        on_batch: Callable[[], None] = lambda: None,
        *,
        augmentation: Augmentation | None = None,
        times: int = 1,
    ) -> Seen:
        """Returns what the head sees of images, in their order.

        Args:
          images: uint8 (N, H, W, C), of the model's size or enlarged to it.
          on_batch: called after each batch of `BATCH` images.
          augmentation: None: the images as they are.
          times: how often all of them are shown, each time augmented otherwise.

        Raises:
          InputError: the model's logits are not the product of what its layers give.
        """
        parts = []
        for epoch in range(times):
            for start in range(0, len(images), BATCH):
                index = np.arange(start, min(start + BATCH, len(images)))
                padded = np.pad(index, (0, BATCH - len(index)), mode="edge")
                seen = self._step(
                    self._variables,
                    images[padded],
                    padded.astype(np.int32),
                    np.int32(epoch),
                    augmentation=augmentation,
                )
                parts.append(_first(len(index), seen))
                on_batch()
        whole = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
        found = head_logits(self._head.layers, whole.features)
        if not np.allclose(found, whole.logits, rtol=1e-3, atol=1e-3 * np.abs(found).max()):
            raise _strange(self._trained)
        return whole

    def _see(
        self,
        variables: Any,
        images: jax.Array,
        index: jax.Array,
        epoch: jax.Array,
        augmentation: Augmentation | None,
    ) -> Seen:
        p, dtype = self._trained.preprocess, self._trained.dtype
        if augmentation is None:
            pixels = preprocess(images, p, dtype)
        else:
            batch = Batch(image=images, label=index, mask=index >= 0, index=index)
            pixels, _ = augment(
                batch,
                key=jax.random.key(self._trained.config.seed),
                epoch=epoch,
                augmentation=augmentation,
                preprocess=p,
                num_classes=self._trained.model.num_classes,
                dtype=dtype,
            )
        entering: dict[Path, jax.Array] = {}

        def note(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            if context.method_name == "__call__" and context.module.path in self._head.paths:
                entering[context.module.path] = args[0]
            return call(*args, **kwargs)

        with nn.intercept_methods(note):
            logits = self._trained.model.apply(variables, pixels, train=False)
        child = logits[0] if isinstance(logits, tuple) else logits
        return Seen(tuple(entering[path] for path in self._head.paths), child)


def _first(count: int, seen: Seen) -> Seen:
    return jax.tree.map(lambda array: np.asarray(array)[:count], seen)


def imprint(layer: Layer, old: Seen, labels: np.ndarray, new: Seen, cost: float) -> Layer:
    """Returns the layer with a row for a class that is known from a few examples.

    As in "Low-Shot Learning with Imprinted Weights" (Qi, Brown and Lowe 2018, section 3.2) the row
    is the mean of the examples, as long as the old rows are. Theirs is a layer of cosines. Here the
    mean of all features is taken away first, and the difference divided by their scatter within
    the classes, as in Fisher's linear discriminant (1936), regularised as by Friedman (1989,
    equation 18). The bias, for which the paper has no part, is as high as the old classes allow,
    or half way down to what the examples need where that is less. Each image is judged by a row
    that was made without it: by its own it would seem farther from the border than others are.

    Args:
      layer: of the old classes.
      old: exemplars of the old classes; their logits are the new class's rivals.
      labels: their classes, int (N,).
      new: the examples; the last of the features, as of `old`, enter the layer.
      cost: share of the exemplars that may be lost to the new class.

    Returns:
      The layer with one class more, the last; the others are as they were.
    """
    # In float64, and from their mean on, so that scores by different rows can be compared.
    centre = old.features[-1].mean(axis=0, dtype=np.float64)
    features, shown = old.features[-1] - centre, new.features[-1] - centre
    length = np.linalg.norm(layer.kernel, axis=0).mean()
    count = len(shown)
    without_one = (shown.sum(axis=0) - shown) / (count - 1)
    means = np.concatenate([shown.mean(axis=0, keepdims=True), without_one])
    row, *others = _directions(features, labels, means) * length
    needs = new.logits.max(axis=1) - (np.stack(others) * shown).sum(axis=1)
    needed = np.quantile(needs, MOST_OF_THEM)
    scores = np.empty(len(labels))
    for fold in range(FOLDS):
        inside = np.arange(len(labels)) % FOLDS == fold
        unseen = _directions(features[~inside], labels[~inside], means[:1])[0] * length
        scores[inside] = features[inside] @ unseen
    may_be_lost = int(cost * len(labels))
    allowed = min(
        _highest_bias(old.logits, labels, unlike, may_be_lost)
        for unlike in (scores, features @ row)
    )
    bias = min(allowed, (allowed + needed) / 2) if allowed < np.inf else needed
    return _appended(layer, row, bias - row @ centre)


def _highest_bias(logits: np.ndarray, labels: np.ndarray, scores: np.ndarray, lost: int) -> float:
    """Returns the bias at which a new class of scores (N,) takes so many from logits (N, K)."""
    room = np.sort((logits.max(axis=1) - scores)[logits.argmax(axis=1) == labels])
    return float(room[lost]) if lost < len(room) else np.inf


def _directions(features: np.ndarray, labels: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Returns unit vectors (T, F) along which means (T, F) leave features (N, F) about 0."""
    inside = features.copy()
    for label in np.unique(labels):
        inside[labels == label] -= features[labels == label].mean(axis=0)
    count, width = features.shape
    # What is divided by is scale * inside' inside + ground, or 1 where no class has two exemplars.
    spread = (inside**2).sum() / max(1, count * width)
    scale, ground = (1 - SHRINKAGE) / max(1, count), SHRINKAGE * spread or 1.0
    if width <= count:
        found = np.linalg.solve(scale * inside.T @ inside + ground * np.eye(width), means.T).T
    else:  # Woodbury's identity: as many equations as exemplars, of which there are fewer
        inner = inside @ inside.T + ground / scale * np.eye(count)
        found = (means - np.linalg.solve(inner, inside @ means.T).T @ inside) / ground
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)


def _appended(layer: Layer, row: np.ndarray, bias: float) -> Layer:
    kernel, old = layer
    return Layer(
        np.concatenate([kernel, row[:, None].astype(kernel.dtype)], axis=1),
        np.append(old, np.asarray(bias, old.dtype)),
    )


def finetune(
    layers: Sequence[Layer],
    old: Seen,
    labels: np.ndarray,
    new: Seen,
    cost: float,
    on_share: Callable[[float], None] = lambda share: None,
) -> tuple[tuple[Layer, ...], np.ndarray]:
    """Returns the layers, trained on exemplars and examples together, from an imprinted start.

    Batches are drawn evenly over the old classes, and `SHARE` times as often from the new one. To
    the cross-entropy is added, for the exemplars, that of the old classes' probabilities with what
    they were before, as in "Learning without Forgetting" (Li and Hoiem 2017, equation 1, at
    temperature 1), which a few hundred images alone do not keep up.

    Args:
      layers: of the old classes; the logits are their product.
      old, labels, new: see `imprint`; the examples may come in several variants.
      cost: share of the exemplars that may be lost in all. Where there is one layer, the bias of
        the new class is lowered until it is no more; a product has no such bias.
      on_share: called with the share of the steps that are done.

    Returns:
      The layers with one class more, the last; and the exemplars' logits (N, K + 1), each by layers
      that were trained without it, as those that learned an image say little about others.
    """
    train = _Training(old, labels, new)
    parts = np.arange(len(labels)) % PARTS
    apart = np.empty((len(labels), old.logits.shape[1] + 1), old.logits.dtype)
    for part in range(PARTS + 1):  # the last is of all exemplars
        kept, left = parts != part, parts == part
        start = _start(layers, _chosen(old, kept), labels[kept], new, cost)
        learned = train(start, kept, partial(_of_part, on_share, part))
        if part < PARTS:
            apart[left] = head_logits(learned, _chosen(old, left).features)
    if len(layers) == 1:
        known, scores = apart[:, :-1], apart[:, -1]
        before, now = ((x.argmax(axis=1) == labels).sum() for x in (old.logits, known))
        may_be_lost = max(0, int(cost * len(labels)) - int(before - now))
        too_high = max(0.0, -_highest_bias(known, labels, scores, may_be_lost))
        apart[:, -1] -= too_high
        (layer,) = learned
        bias = np.append(layer.bias[:-1], layer.bias[-1] - too_high).astype(layer.bias.dtype)
        learned = (layer._replace(bias=bias),)
    return learned, apart


def _of_part(on_share: Callable[[float], None], part: int, share: float) -> None:
    on_share((part + share) / (PARTS + 1))


def _chosen(seen: Seen, chosen: np.ndarray) -> Seen:
    return jax.tree.map(lambda array: array[chosen], seen)


class _Training:
    """Trains layers on exemplars and examples; the step is compiled once."""

    def __init__(self, old: Seen, labels: np.ndarray, new: Seen):
        self._classes = old.logits.shape[1]
        examples = np.full(len(new.logits), self._classes)
        self._targets = np.append(labels, examples).astype(np.int32)
        both = jax.tree.map(lambda *arrays: np.concatenate(arrays), old, new)
        self._data = jax.device_put((both.features, self._targets, both.logits))
        self._optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, STEPS))
        self._run = jax.jit(
            lambda state, data, batches: jax.lax.scan(partial(self._step, data), state, batches)[0],
            compiler_options=ops.compiler_options(),
        )

    def __call__(
        self, start: tuple[Layer, ...], kept: np.ndarray, on_share: Callable[[float], None]
    ) -> tuple[Layer, ...]:
        """Returns the layers after training on the exemplars that are kept, bool (N,)."""
        used = np.append(kept, np.ones(len(self._targets) - len(kept), bool))
        counts = np.bincount(self._targets[used], minlength=self._classes + 1)
        shares = np.where(self._targets == self._classes, SHARE, 1.0)
        chances = np.where(used, shares / np.maximum(counts[self._targets], 1), 0.0)
        batches = np.random.default_rng(0).choice(
            len(chances), (STEPS, IMAGES_A_STEP), p=chances / chances.sum()
        )
        state: Any = (start, self._optimizer.init(start))
        for i, some in enumerate(np.split(batches.astype(np.int32), REPORTS), start=1):
            state = jax.block_until_ready(self._run(state, self._data, some))
            on_share(i / REPORTS)
        return jax.tree.map(lambda now, was: np.asarray(now, was.dtype), state[0], start)

    def _step(self, data: Any, state: Any, batch: jax.Array) -> tuple[Any, None]:
        """Takes one step of Adam on the images of a batch, int (B,)."""
        layers, moments = state
        features, targets, before = jax.tree.map(lambda array: array[batch], data)

        def loss(layers: Any) -> jax.Array:
            logits = head_logits(layers, features)
            entropy = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            known = logits[:, : self._classes]
            forgotten = optax.softmax_cross_entropy(known, jax.nn.softmax(before))
            is_old = targets < self._classes
            memory = (forgotten * is_old).sum() / jnp.maximum(is_old.sum(), 1)
            return entropy.mean() + MEMORY * memory

        updates, moments = self._optimizer.update(jax.grad(loss)(layers), moments, layers)
        return (optax.apply_updates(layers, updates), moments), None


def _start(
    layers: Sequence[Layer], old: Seen, labels: np.ndarray, new: Seen, cost: float
) -> tuple[Layer, ...]:
    """Returns the layers with a row each: the last is imprinted, other factors are constants."""
    factors = [head_logits([layer], [x]) for layer, x in zip(layers, old.features, strict=True)]
    sizes = [float(np.sqrt((factor**2).mean())) for factor in factors[:-1]]
    size = float(np.prod(sizes))
    rivals, shown = (seen._replace(logits=seen.logits / size) for seen in (old, new))
    others = [
        _appended(layer, np.zeros(len(layer.kernel)), bias)
        for layer, bias in zip(layers[:-1], sizes, strict=True)
    ]
    return (*others, imprint(layers[-1], rivals, labels, shown, cost))
