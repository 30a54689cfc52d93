"""Whether heat maps lie on what they are to find: on images whose object is known to the pixel.

    python benchmarks/localisation.py --json=benchmarks/results/localisation.json
    python benchmarks/localisation.py --model=baseline_cnn --image_size=64

Each image is clutter (coloured rectangles, lines and noise) with one object, a disc that bears the
texture of its class at a random place, in random colours. A model is trained on some; of others
that it classifies correctly a map hits where its maximum lies on the object, and its box is judged
by its intersection over union with the object's, at several thresholds.

`pooled` is a small network with a map of a fourth of the image's sides. The registered ones have
coarser maps, of which one pixel is as large as the object: baseline_cnn's at 64 pixels is 4x4.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

from flaxcls import ops

NOTE = ops.prepare_process()  # as main does: before JAX starts its threads

import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import machine  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from flaxcls import models  # noqa: E402
from flaxcls.analysis.explain import Box, Explainer, available, bounding_box  # noqa: E402
from flaxcls.batch import Preprocess, preprocess  # noqa: E402

CLASSES = 4
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
# Radius of the object, as shares of the image's side: it covers 7 to 20 % of the image.
RADIUS = (0.15, 0.25)


class Pooled(nn.Module):
    """Three convolutions, the mean over space, a dense layer."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for i, features in enumerate((16, 32, 64)):
            x = ops.Conv(features, (3, 3))(x)
            x = ops.BatchNorm()(x, use_running_average=not train, relu=True, pool=i > 0)
        return ops.Dense(self.num_classes)(x.mean((1, 2)))


class Scenes(NamedTuple):
    """uint8 images (N, S, S, 3), labels int32 (N,), masks bool (N, S, S) of the objects."""

    images: np.ndarray
    labels: np.ndarray
    masks: np.ndarray


def make_scenes(n: int, size: int, seed: int) -> Scenes:
    """Draws N scenes of S pixels a side; the object is inside whole."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n).astype(np.int32)
    images = np.empty((n, size, size, 3), np.uint8)
    masks = np.empty((n, size, size), bool)
    for i, label in enumerate(labels):
        images[i], masks[i] = _scene(int(label), size, rng)
    return Scenes(images, labels, masks)


def _scene(label: int, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    image = np.empty((size, size, 3))
    image[:] = rng.uniform(40, 215, 3)
    y, x = np.mgrid[:size, :size]
    for _ in range(12):
        centre, half = rng.uniform(0, size, 2), rng.uniform(0.02, 0.2, 2) * size
        inside = (abs(y - centre[0]) < half[0]) & (abs(x - centre[1]) < half[1])
        image[inside] = rng.uniform(0, 255, 3)
    for _ in range(6):
        angle, place = rng.uniform(0, np.pi), rng.uniform(0, size, 2)
        away = (y - place[0]) * np.cos(angle) + (x - place[1]) * np.sin(angle)
        image[abs(away) < rng.uniform(0.5, 1.5)] = rng.uniform(0, 255, 3)
    radius = rng.uniform(*RADIUS) * size
    row, column = rng.uniform(radius, size - radius, 2)
    mask = (y + 0.5 - row) ** 2 + (x + 0.5 - column) ** 2 <= radius**2
    dark, light = rng.uniform(0, 100, 3), rng.uniform(155, 255, 3)
    texture = _texture(label, y + rng.integers(8), x + rng.integers(8))
    image[mask] = np.where(texture[..., None], light, dark)[mask]
    image += rng.normal(0, 10, image.shape)
    return image.clip(0, 255).astype(np.uint8), mask


def _texture(label: int, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Bool: stripes across, stripes down, a chessboard or dots, of a period of 6 pixels."""
    rows, columns = y % 6 < 3, x % 6 < 3
    return (rows, columns, rows ^ columns, rows & columns)[label]


def train(model: nn.Module, scenes: Scenes, p: Preprocess, *, epochs: int, batch_size: int) -> Any:
    """Returns the variables of the model trained with Adam on cross-entropy, 1e-3 to 0."""
    shape = (1, p.size, p.size, p.channels)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros(shape))
    params, stats = variables["params"], variables.get("batch_stats", {})
    steps = len(scenes.labels) // batch_size
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, epochs * steps))

    def step(state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, jax.Array]:
        params, stats, optimizer_state = state

        def objective(params: Any) -> tuple[jax.Array, Any]:
            logits, moved = model.apply(
                {"params": params, "batch_stats": stats},
                preprocess(images, p),
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(0)},
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, moved.get("batch_stats", {})

        (loss, stats), gradient = jax.value_and_grad(objective, has_aux=True)(params)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        return (optax.apply_updates(params, updates), stats, optimizer_state), loss

    compiled = jax.jit(step, donate_argnums=0, compiler_options=ops.compiler_options())
    state = (params, stats, jax.jit(optimizer.init)(params))
    rng = np.random.default_rng(0)
    for epoch in range(epochs):
        order, losses = rng.permutation(len(scenes.labels)), []
        for i in range(steps):
            chosen = order[i * batch_size : (i + 1) * batch_size]
            state, loss = compiled(state, scenes.images[chosen], scenes.labels[chosen])
            losses.append(loss)
        print(f"epoch {epoch + 1}: loss {np.mean(jax.device_get(losses)):.4f}", flush=True)
    return {"params": state[0], "batch_stats": state[1]}


def measure(explainer: Explainer, scenes: Scenes) -> dict[str, Any]:
    """Returns the share of hits and the mean IoU of boxes by threshold, of what is classified well.

    The map is that of the true class, which is the predicted one.
    """
    start = time.perf_counter()
    maps = explainer(scenes.images)
    seconds = time.perf_counter() - start
    right = maps.classes == scenes.labels
    heats, masks = maps.heat[right], scenes.masks[right]
    tops = heats.reshape(len(heats), -1).argmax(1)
    hits = np.take_along_axis(masks.reshape(len(masks), -1), tops[:, None], 1)
    return {
        "correct": float(right.mean()),
        "hits": float(hits.mean()),
        "iou": {t: _mean_iou(heats, masks, t) for t in THRESHOLDS},
        "seconds": seconds,
    }


def _mean_iou(heats: np.ndarray, masks: np.ndarray, threshold: float) -> float:
    return float(
        np.mean([iou(bounding_box(h, threshold), m) for h, m in zip(heats, masks, strict=True)])
    )


def iou(box: Box | None, mask: np.ndarray) -> float:
    """Intersection over union of a box with the box of a mask."""
    truth = bounding_box(mask.astype(np.float32))
    if box is None or truth is None:
        return 0.0
    width = min(box.x1, truth.x1) - max(box.x0, truth.x0)
    height = min(box.y1, truth.y1) - max(box.y0, truth.y0)
    common = max(0, width) * max(0, height)
    areas = sum((b.x1 - b.x0) * (b.y1 - b.y0) for b in (box, truth))
    return common / (areas - common)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="pooled", help="pooled, or a registered model")
    parser.add_argument("--image_size", type=int, default=48)
    parser.add_argument("--train", type=int, default=2000, help="images to train on")
    parser.add_argument("--test", type=int, default=500, help="images to explain")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    given = parser.parse_args()
    print(NOTE)
    about = machine.describe(machine.own_devices())
    pooled = given.model == "pooled"
    model = Pooled(CLASSES) if pooled else models.create_model(given.model, CLASSES)
    p = Preprocess(given.image_size, 3, (0.5,), (0.25,))
    scenes = make_scenes(given.train, given.image_size, seed=1)
    variables = train(model, scenes, p, epochs=given.epochs, batch_size=given.batch_size)
    test = make_scenes(given.test, given.image_size, seed=2)
    rows = []
    for method in available(model, variables, p):
        row = {"method": method, **measure(Explainer(model, variables, p, method=method), test)}
        rows.append(row)
        boxes = "  ".join(f"{t}: {value:.3f}" for t, value in row["iou"].items())
        print(
            f"{method:12} correct {row['correct']:.1%}  on the object {row['hits']:.1%}  "
            f"mean IoU at {boxes}  {row['seconds']:.1f} s",
            flush=True,
        )
    if given.json is not None:
        command = machine.command(parser, given)
        result = {"command": command, "machine": about, "rows": rows}
        given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
