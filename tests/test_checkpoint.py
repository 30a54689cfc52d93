"""Checkpoints: which stay, what is left of a damaged one, and where they are restored to."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.sharding import SingleDeviceSharding

from flaxcls.checkpoint import Checkpoints, abstract
from flaxcls.errors import InputError


class State(struct.PyTreeNode):
    step: jax.Array
    params: dict


def make_state(step=0, width=4):
    kernel = jnp.full((3, width), float(step))
    return State(jnp.int32(step), {"dense": {"kernel": kernel, "bias": jnp.zeros(width)}})


COUNTED = {"count": np.arange(3)}
HERE = SingleDeviceSharding(jax.devices()[0])
WANTED = (abstract(make_state(), HERE), abstract(COUNTED, HERE))


def save(checkpoints, step, best=None):
    log = {"history": [{"epoch": step, "loss": 0.1 + step}], "data": "abc"}
    checkpoints.save(step, make_state(step), COUNTED, log, best)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture
def saved(folder):
    """A folder with steps 1, 2 and 3."""
    with Checkpoints(folder, keep=3) as checkpoints:
        for step in (1, 2, 3):
            save(checkpoints, step)
    return folder


def damage(path):
    """Cuts the file of a checkpoint that holds its arrays in half."""
    largest = max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


@pytest.mark.parametrize(
    ("keep", "bests", "left"),
    [
        (1, [1, 1, 1, 1, 1], [1, 5]),
        (2, [1, 2, 2, 2, 2], [2, 4, 5]),
        (2, [1, 2, 2, 2, 5], [4, 5]),
        (1, [1, 2, 3, 4, 5], [5]),
        (3, [None] * 5, [3, 4, 5]),
        (9, [1] * 5, [1, 2, 3, 4, 5]),
    ],
)
def test_the_latest_and_the_best_stay(folder, keep, bests, left):
    with Checkpoints(folder, keep) as checkpoints:
        for step, best in enumerate(bests, start=1):
            save(checkpoints, step, best)
        checkpoints.wait()
        assert checkpoints.steps() == left
    with Checkpoints(folder, keep) as checkpoints:
        assert checkpoints.steps() == left
        save(checkpoints, 6, best=bests[-1])
        checkpoints.wait()
        kept = sorted({*range(7 - keep, 7), bests[-1] or 6} & {*left, 6})
        assert checkpoints.steps() == kept


def test_everything_that_was_saved_comes_back(saved):
    with Checkpoints(saved) as checkpoints:
        latest = checkpoints.restore_latest(*WANTED)
        first = checkpoints.restore(1, *WANTED)
    assert (latest.step, first.step, latest.damaged) == (3, 1, ())
    assert isinstance(latest.state, State)
    jax.tree.map(np.testing.assert_array_equal, latest.state, make_state(3))
    jax.tree.map(np.testing.assert_array_equal, first.state, make_state(1))
    np.testing.assert_array_equal(latest.metrics["count"], COUNTED["count"])
    assert latest.log == {"history": [{"epoch": 3, "loss": 3.1}], "data": "abc"}


def test_without_any_checkpoint_there_is_nothing_to_restore(folder):
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.restore_latest(*WANTED) is None
        with pytest.raises(InputError, match="no checkpoint of step 7; choose one of none"):
            checkpoints.restore(7, *WANTED)


def test_the_state_may_be_overwritten_while_it_is_still_being_written(folder):
    # 16 MB, so that writing outlasts the next steps, each of which takes its memory over.
    wanted = abstract({"w": jax.ShapeDtypeStruct((1 << 22,), jnp.float32)}, HERE)
    state = {"w": jnp.arange(float(1 << 22))}
    take = jax.jit(lambda state: {"w": state["w"] * 0 - 1}, donate_argnums=0)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, state, COUNTED, {}, None)
        for _ in range(3):
            state = take(state)
        jax.block_until_ready(state)
        checkpoints.wait()
        restored = checkpoints.restore(1, wanted, WANTED[1]).state
    np.testing.assert_array_equal(restored["w"], np.arange(float(1 << 22)))


def test_a_step_that_is_there_is_left_as_it_is(saved):
    with Checkpoints(saved) as checkpoints:
        checkpoints.save(3, make_state(30), COUNTED, {}, None)
        checkpoints.wait()
        assert checkpoints.restore_latest(*WANTED).state.step == 3


@pytest.mark.parametrize("kind", ["cut", "empty", "lost"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(saved, kind):
    if kind == "cut":
        damage(saved / "3")
    elif kind == "empty":
        for file in (saved / "3" / "state").rglob("*"):
            if file.is_file():
                os.truncate(file, 0)
    else:
        (saved / "3" / "log" / "metadata").unlink()
    with Checkpoints(saved, keep=3) as checkpoints:
        restored = checkpoints.restore_latest(*WANTED)
        assert (restored.step, restored.damaged) == (2, (3,))
        save(checkpoints, 3)  # the step is taken again
    aside = list((saved.parent / "damaged_checkpoints").iterdir())
    assert [folder.name[:2] for folder in aside] == ["3-"]
    with Checkpoints(saved, keep=3) as checkpoints:
        assert checkpoints.restore_latest(*WANTED).step == 3


def test_a_half_written_checkpoint_is_no_checkpoint(saved):
    (saved / "3").rename(saved / "3.orbax-checkpoint-tmp")
    with Checkpoints(saved, read_only=True) as checkpoints:
        assert checkpoints.restore_latest(*WANTED).step == 2
    assert (saved / "3.orbax-checkpoint-tmp").exists(), "reading removes nothing"
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.restore_latest(*WANTED).step == 2


def test_reading_leaves_a_damaged_checkpoint_where_it_is(saved):
    damage(saved / "3")
    with Checkpoints(saved, read_only=True) as checkpoints:
        assert checkpoints.restore_latest(*WANTED).step == 2
    assert (saved / "3").exists()


def test_where_all_are_damaged_the_latest_is_named(saved):
    for step in (1, 2, 3):
        damage(saved / str(step))
    with (
        Checkpoints(saved) as checkpoints,
        pytest.raises(InputError, match=r"checkpoints/3: .* damaged"),
    ):
        checkpoints.restore_latest(*WANTED)
    assert sorted(path.name for path in saved.iterdir() if path.is_dir()) == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (make_state(width=5), r"params/dense/bias has shape \(4,\) .* shape \(5,\) in the model"),
        (
            State(jnp.int32(0), {"dense": {"kernel": jnp.zeros((3, 4))}}),
            r"params/dense/bias has shape \(4,\) in the checkpoint and no place in the model",
        ),
        (
            make_state().replace(params={**make_state().params, "head": jnp.zeros(2)}),
            r"params/head has no place in the checkpoint and shape \(2,\) in the model",
        ),
    ],
)
def test_another_model_is_told_by_its_arrays(saved, wanted, message):
    with Checkpoints(saved) as checkpoints:
        for restore in (checkpoints.restore_latest, partial(checkpoints.restore, 2)):
            with pytest.raises(InputError, match=message):
                restore(abstract(wanted, HERE), WANTED[1])
        assert checkpoints.steps() == [1, 2, 3]


RESHARDS = """
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from flaxcls.checkpoint import Checkpoints, abstract
from flaxcls.sharding import create_mesh, put_replicated, replicated, state_shardings

assert jax.device_count() == 8
values = {"large": np.arange(2.0**17).reshape(2**9, 2**8), "small": np.arange(5.0)}
shapes = jax.eval_shape(lambda: jax.tree.map(jnp.float32, values))
counted = {"count": np.arange(3)}


def placed(devices, shard):
    mesh = create_mesh(devices)
    return mesh, state_shardings(shapes, mesh, shard_params=shard)


def restore(folder, devices, shard):
    mesh, shardings = placed(devices, shard)
    with Checkpoints(folder, read_only=True) as checkpoints:
        wanted = abstract(shapes, shardings), abstract(counted, replicated(mesh))
        state = checkpoints.restore_latest(*wanted).state
    for name, value in values.items():
        np.testing.assert_array_equal(state[name], value)
        assert state[name].sharding == shardings[name]
    parts = len({str(s.index) for s in state["large"].addressable_shards})
    assert parts == (devices if shard else 1)


for number, (devices, shard) in enumerate([(8, True), (1, False), (8, False)]):
    folder = Path(sys.argv[1]) / str(number)
    mesh, shardings = placed(devices, shard)
    with Checkpoints(folder) as checkpoints:
        state = jax.device_put(jax.tree.map(np.float32, values), shardings)
        checkpoints.save(1, state, put_replicated(counted, mesh), {}, None)
    restore(folder, 1, False)
    restore(folder, 4, True)
    restore(folder, 8, False)
"""


def test_a_checkpoint_opens_on_any_number_of_devices(tmp_path):
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, "-c", RESHARDS, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
