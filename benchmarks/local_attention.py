"""What local attention and the LSTM of the product photos' networks save over their plain forms.

    python benchmarks/local_attention.py
    python benchmarks/local_attention.py --json=benchmarks/results/attention_lstm.json

At the sizes that batches of 8 photos of 224x224 have inside the networks, in float32.

- Local attention: with its gradient written out; the same nine shifted views with automatic
  differentiation; and, differentiated likewise, one array of all neighbours, (N, H, W, 9, C).
- The LSTM: with a scan for each layer and the projection in front of it; as flax.linen.RNN, which
  has the projection in the scan; and with one scan for all layers, the projection in it.
- The network of the LSTM, and the one that lacks it.

The forms of one thing are first checked to give the same numbers, and then take turns, since the
machine's speed drifts.
"""

import argparse
import dataclasses
import inspect
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flaxcls import ops

NOTE = ops.prepare_process()  # as main does: before JAX starts its threads

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import machine  # noqa: E402
import numpy as np  # noqa: E402
from flax import linen as nn  # noqa: E402

from flaxcls import models  # noqa: E402
from flaxcls.models.layers import Layers  # noqa: E402
from flaxcls.models.local_attention_cnn import attend_locally  # noqa: E402
from flaxcls.models.lstm_cnn import LSTM  # noqa: E402

BATCH_SIZE, IMAGE_SIZE, CLASSES = 8, 224, 9
MAPS = (BATCH_SIZE, 28, 28, 128)  # that local attention sees
SEQUENCE = (BATCH_SIZE, 6272, 4)  # that the LSTM sees
LSTM_LAYERS = 2


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Compiled forms of one computation.

    Attributes:
      name: what is computed.
      forms: by name; the others are measured against the first.
      same: whether all must give the same numbers.
    """

    name: str
    forms: dict[str, Callable[[], Any]]
    same: bool = True


def compiled(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """Returns the compiled function with its arguments, which stay on the device."""
    return partial(jax.jit(function, compiler_options=ops.compiler_options()), *arguments)


def with_gradient(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Returns what takes the result's gradient and the arguments, and gives result and theirs."""

    def run(gradient: jax.Array, *arguments: Any) -> Any:
        result, pull = jax.vjp(function, *arguments)
        return result, pull(gradient)

    return run


def noise(seed: int, shape: Sequence[int]) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def gathered_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, offsets: jax.Array
) -> jax.Array:
    """`attend_locally` with as many heads as channels, on arrays of all neighbours."""
    h, w = query.shape[1:3]
    rows = np.arange(h)[:, None, None] + np.repeat(np.arange(3), 3)
    columns = np.arange(w)[:, None] + np.tile(np.arange(3), 3)

    def neighbours(x: jax.Array) -> jax.Array:
        """x (N, H, W, C) -> (N, H, W, 9, C)."""
        return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))[:, rows, columns]

    weights = nn.softmax(query[..., None, :] * (neighbours(key) + offsets), axis=-2)
    return (weights * neighbours(value)).sum(-2)


def attention() -> Comparison:
    """Local attention with a head a channel, as published."""
    arguments = [noise(i, MAPS) for i in range(4)]  # gradient, query, key, value
    arguments.append(noise(4, (9, MAPS[-1])))
    heads = MAPS[-1]
    forms: dict[str, Callable[..., jax.Array]] = {
        "gradient written out": lambda *a: attend_locally(*a, heads),
        "automatic gradient": lambda *a: inspect.unwrap(attend_locally)(*a, heads),
        "array of all neighbours": gathered_attention,
    }
    return Comparison(
        "local attention, forward and gradient",
        {name: compiled(with_gradient(f), *arguments) for name, f in forms.items()},
    )


def in_one_scan(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """`LSTM` with its projection in the scan over the sequence."""
    cell, cells = nn.OptimizedLSTMCell(x.shape[-1]), flax_cells(params)

    def step(carries: list[Any], x: Any) -> tuple[list[Any], Any]:
        new_carries = []
        for carry, own in zip(carries, cells, strict=True):
            carry, x = cell.apply({"params": own}, carry, x)
            new_carries.append(carry)
        return new_carries, x

    zeros = jnp.zeros((x.shape[0], x.shape[-1]))
    _, hidden = jax.lax.scan(step, [(zeros, zeros)] * LSTM_LAYERS, jnp.swapaxes(x, 0, 1))
    return jnp.swapaxes(hidden, 0, 1)


def flax_rnn(params: dict[str, jax.Array], x: Any) -> Any:
    """`LSTM` as stacked flax.linen.RNN."""
    rnn = nn.RNN(nn.OptimizedLSTMCell(x.shape[-1]))
    for own in flax_cells(params):
        x = rnn.apply({"params": {"cell": own}}, x)
    return x


def flax_cells(params: dict[str, jax.Array]) -> list[dict[str, dict[str, jax.Array]]]:
    """Returns the parameters of `LSTM` as those of one flax.linen.OptimizedLSTMCell a layer."""
    cells = []
    for i in range(1, LSTM_LAYERS + 1):
        names = (f"input{i}_kernel", f"hidden{i}_kernel", f"input{i}_bias")
        gates = zip("ifgo", *(jnp.split(params[name], 4, axis=-1) for name in names), strict=True)
        cell = {}
        for gate, of_input, of_hidden, bias in gates:
            cell[f"i{gate}"] = {"kernel": of_input}
            cell[f"h{gate}"] = {"kernel": of_hidden, "bias": bias}
        cells.append(cell)
    return cells


def lstms() -> list[Comparison]:
    x, gradient = noise(0, SEQUENCE), noise(1, SEQUENCE)
    lstm = LSTM(Layers("pytorch", None, jnp.float32), SEQUENCE[-1], LSTM_LAYERS, biases=1)
    params = lstm.init(jax.random.key(0), x)["params"]
    forms: dict[str, Callable[..., Any]] = {
        "a scan a layer, projection in front": lambda params, x: lstm.apply({"params": params}, x),
        "a scan a layer, projection in it (flax.linen.RNN)": flax_rnn,
        "one scan for all layers, projection in it": in_one_scan,
    }
    gradients = {name: with_gradient(function) for name, function in forms.items()}
    return [
        Comparison("LSTM, forward", {name: compiled(f, params, x) for name, f in forms.items()}),
        Comparison(
            "LSTM, forward and gradient",
            {name: compiled(f, gradient, params, x) for name, f in gradients.items()},
        ),
    ]


def networks() -> list[Comparison]:
    """The network of the LSTM and the one that lacks it, as they are evaluated and trained."""
    images = noise(0, (BATCH_SIZE, IMAGE_SIZE, IMAGE_SIZE, 3))
    gradient = noise(1, (BATCH_SIZE, CLASSES))
    forward, training = {}, {}
    for name in ("baseline_cnn", "lstm_cnn"):
        model = models.create_model(name, CLASSES)
        variables = model.init(jax.random.key(0), images, train=False)
        forward[name] = compiled(model.apply, variables, images)
        training[name] = compiled(partial(training_pass, model), gradient, variables, images)
    return [
        Comparison("network, forward", forward, same=False),
        Comparison("network, forward and gradient in training", training, same=False),
    ]


def training_pass(
    model: Any, gradient: jax.Array, variables: dict[str, Any], images: jax.Array
) -> Any:
    """Returns the gradients of the parameters, given that of the logits, and new statistics."""

    def logits(params: Any) -> Any:
        own = {**variables, "params": params}
        return model.apply(own, images, train=True, mutable=["batch_stats"])

    _, pull, statistics = jax.vjp(logits, variables["params"], has_aux=True)
    return pull(gradient), statistics


def check(comparison: Comparison) -> None:
    """Compiles and runs all forms.

    Raises:
      AssertionError: two give different numbers.
    """
    first, *others = (jax.block_until_ready(form()) for form in comparison.forms.values())
    if comparison.same:
        for other in others:
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-2, atol=1e-2), other, first)


def turn(form: Callable[[], Any], seconds: float) -> float:
    """Runs the form for so many seconds, at least once; returns seconds a run."""
    began, runs = time.monotonic(), 0
    while runs == 0 or time.monotonic() < began + seconds:
        jax.block_until_ready(form())
        runs += 1
    return (time.monotonic() - began) / runs


def measure(comparison: Comparison, rounds: int, seconds: float) -> dict[str, Any]:
    """Lets the forms take turns."""
    check(comparison)
    times: dict[str, list[float]] = {name: [] for name in comparison.forms}
    for _ in range(rounds):
        for name, form in comparison.forms.items():
            times[name].append(turn(form, seconds))
    first = next(iter(times.values()))
    return {
        "name": comparison.name,
        "ratios": {
            name: statistics.median(b / a for a, b in zip(first, own, strict=True))
            for name, own in times.items()
        },
        "seconds": times,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table of medians."""
    lines = ["| | form | ratio | ms |", "|---|---|---|---|"]
    for row in rows:
        for name, ratio in row["ratios"].items():
            milliseconds = 1000 * statistics.median(row["seconds"][name])
            lines.append(f"| {row['name']} | {name} | {ratio:.2f} | {milliseconds:.4g} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.3, help="of one form's turn, at least")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    arguments = parser.parse_args()
    print(NOTE)
    about = machine.describe(machine.own_devices())
    rows = []
    for make in (lambda: [attention()], lstms, networks):
        rows += [measure(c, arguments.rounds, arguments.seconds) for c in make()]
    print(table(rows))
    if arguments.json is not None:
        result = {
            "command": machine.command(parser, arguments),
            "machine": about,
            "sizes": {"maps": MAPS, "sequence": SEQUENCE, "lstm_layers": LSTM_LAYERS}
            | {"images": (BATCH_SIZE, IMAGE_SIZE, IMAGE_SIZE, 3)},
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
