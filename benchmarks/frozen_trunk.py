"""What freezing the trunk of ResNet-18 saves of a training step.

    python benchmarks/frozen_trunk.py
    python benchmarks/frozen_trunk.py --json=benchmarks/results/frozen_trunk.json

`hierarchical_resnet18` with 37 classes under 2, Adam, batches of noise that stay on the device.
Rounds of the full step and of the step with a frozen trunk alternate, since the machine's speed
drifts.
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from flaxcls import ops

NOTE = ops.prepare_process()  # as main does: before JAX starts its threads

import jax  # noqa: E402
import machine  # noqa: E402
import numpy as np  # noqa: E402

from flaxcls import metrics, models  # noqa: E402
from flaxcls.augment import Augmentation  # noqa: E402
from flaxcls.batch import Batch, Preprocess  # noqa: E402
from flaxcls.freezing import EVERYTHING, Selection  # noqa: E402
from flaxcls.losses import create_loss  # noqa: E402
from flaxcls.optimizers import create_optimizer, create_schedule  # noqa: E402
from flaxcls.state import create_state  # noqa: E402
from flaxcls.step import Recipe, train_step  # noqa: E402

CLASSES = 37
PARENTS = tuple(int(i >= 12) for i in range(CLASSES))
TARGET = 0.45


class Step:
    """A compiled step with its state and one batch."""

    def __init__(self, selection: Selection, size: int, batch_size: int):
        schedule = create_schedule("constant", 1e-3, steps_per_epoch=100, epochs=1)
        self.recipe = Recipe(
            model=models.create_model("hierarchical_resnet18", CLASSES),
            loss=create_loss("hierarchical", parents=PARENTS),
            optimizer=create_optimizer("adam", schedule),
            schedule=schedule,
            preprocess=Preprocess(size, 3, (0.5,) * 3, (0.25,) * 3),
            augmentation=Augmentation(),
            num_classes=CLASSES,
            seed=0,
            steps_per_epoch=100,
            selection=selection,
        )
        rng = np.random.default_rng(0)
        label = rng.integers(0, CLASSES, batch_size)
        parent = np.array(PARENTS)[label]
        self.batch = Batch(
            image=jax.device_put(rng.integers(0, 256, (batch_size, size, size, 3), np.uint8)),
            label=np.stack([label, parent], axis=1).astype(np.int32),
            mask=np.ones(batch_size, bool),
            index=np.arange(batch_size, dtype=np.int32),
        )
        self.state = jax.jit(
            partial(
                create_state,
                self.recipe.model,
                self.recipe.optimizer,
                (size, size, 3),
                seed=0,
                selection=selection,
            )
        )()
        self.metrics = metrics.empty(CLASSES, parts=("child", "parent", "kl"), parents=PARENTS)
        self.run = jax.jit(
            partial(train_step, self.recipe),
            donate_argnums=(0, 1),
            compiler_options=ops.compiler_options(),
        )
        self.round(2)  # compiles

    def round(self, steps: int) -> float:
        """Returns seconds a step."""
        began = time.monotonic()
        for _ in range(steps):
            self.state, self.metrics, totals = self.run(self.state, self.metrics, self.batch)
        jax.block_until_ready(totals)
        return (time.monotonic() - began) / steps


def measure(size: int, batch_size: int, rounds: int, steps: int) -> dict[str, Any]:
    """Alternates rounds of both steps."""
    full = Step(EVERYTHING, size, batch_size)
    frozen = Step(Selection(frozen=("trunk/*",)), size, batch_size)
    pairs = [(full.round(steps), frozen.round(steps)) for _ in range(rounds)]
    return {
        "image_size": size,
        "batch_size": batch_size,
        "full_seconds": [a for a, _ in pairs],
        "frozen_seconds": [b for _, b in pairs],
        "ratio": statistics.median(b / a for a, b in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--image_size", type=int, default=112)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="in one round")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    arguments = parser.parse_args()
    print(NOTE)
    about = machine.describe(machine.own_devices())
    row = measure(arguments.image_size, arguments.batch_size, arguments.rounds, arguments.steps)
    full, frozen = (statistics.median(row[f"{k}_seconds"]) for k in ("full", "frozen"))
    print(f"full step {full:.3f} s, frozen trunk {frozen:.3f} s: {row['ratio']:.3f} of it")
    if arguments.json is not None:
        command = machine.command(parser, arguments)
        result = {"command": command, "machine": about, "rows": [row]}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(0 if row["ratio"] <= TARGET else 1)


if __name__ == "__main__":
    main()
