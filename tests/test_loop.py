"""The loop: what it fetches, sends and compiles, when it stops, and what it keeps."""

import collections
import json
import threading
from types import SimpleNamespace

import jax
import jax.monitoring
import numpy as np
import pytest
from small_experiments import lenet

from flaxcls import train
from flaxcls.checkpoint import Checkpoints
from flaxcls.errors import InputError
from flaxcls.history import find_record
from flaxcls.optimizers import plateau_scale

# Listeners cannot be taken away again, so that there is one for all tests.
COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: COMPILED.append(event) if "backend_compile" in event else None
)


@pytest.fixture
def loops(monkeypatch):
    """The loops that the test runs."""
    made = []

    class Kept(train.Loop):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(train, "Loop", Kept)
    return made


def run(config, folder):
    return train.train(config, folder, train.StopRequest(), [])


def saved_steps(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").glob("[0-9]*"))


def records(history, split):
    return [record for record in history if record["split"] == split]


class Watch:
    """Counts, while an epoch runs, what comes to the host other than by `fetch` and `save`."""

    def __init__(self, monkeypatch):
        self.fetches = self.others = 0
        self.compiled_after_first_epoch = None
        self._allowed = False
        self._watching = False
        array = type(jax.numpy.zeros(()))
        value = array._value.fget if isinstance(array._value, property) else None
        assert value is not None

        def counted(this):
            if self._watching and not self._allowed and _in_main_thread():
                self.others += 1
            return value(this)

        monkeypatch.setattr(array, "_value", property(counted))
        monkeypatch.setattr("flaxcls.train.fetch", self._fetch)
        monkeypatch.setattr("flaxcls.evaluate.fetch", self._fetch)
        save, epoch, loop = Checkpoints.save, train.Loop._train_epoch, train.Loop.run

        def allowed_save(*args):
            self._allowed, before = True, self._allowed
            save(*args)
            self._allowed = before

        def counted_epoch(this, number, batches):
            if number == 2:
                assert COMPILED, "the first epoch was not heard compiling"
                COMPILED.clear()
            return epoch(this, number, batches)

        def guarded_run(this):
            self._watching = True
            jax.config.update("jax_transfer_guard_host_to_device", "disallow")
            try:
                loop(this)
            finally:
                jax.config.update("jax_transfer_guard_host_to_device", "allow")
                self._watching = False
                self.compiled_after_first_epoch = list(COMPILED)

        monkeypatch.setattr(Checkpoints, "save", allowed_save)
        monkeypatch.setattr(train.Loop, "_train_epoch", counted_epoch)
        monkeypatch.setattr(train.Loop, "run", guarded_run)

    def _fetch(self, tree):
        self.fetches += self._watching
        self._allowed, before = True, self._allowed
        host = jax.device_get(tree)
        self._allowed = before
        return host


def _in_main_thread():
    return threading.current_thread() is threading.main_thread()


@pytest.mark.parametrize(
    "changes",
    [
        {"data__placement": "device", "schedule__name": "plateau", "schedule__patience": 0},
        {"data__placement": "host", "train__steps_per_call": 2, "optimizer__ema_decay": 0.9},
    ],
    ids=["device", "host"],
)
def test_an_epoch_fetches_its_metrics_alone_sends_nothing_unasked_and_compiles_nothing(
    changes, tmp_path, monkeypatch
):
    watch = Watch(monkeypatch)
    config = lenet(log__every_seconds=1e6, **changes)
    assert config.train.epochs == 3
    run(config, tmp_path)
    assert watch.fetches == 2 * 3, "one an epoch and split"
    assert watch.others == 0
    assert watch.compiled_after_first_epoch == []


def test_of_the_first_call_only_compilation_is_left_out_of_the_epoch(tmp_path, monkeypatch, loops):
    """On CPU the first call returns after the step, or after the many that it takes."""
    clock = SimpleNamespace(now=0.0, compiled=0.0)
    step_function = train.Loop._step_function

    def slow(this, count):
        step = step_function(this, count)

        def call(*arguments):
            clock.now += 1
            clock.compiled = 0.25
            return step(*arguments)

        return call

    def monotonic():
        clock.now += 1e-6
        return clock.now

    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=monotonic))
    monkeypatch.setattr(train, "compile_seconds", lambda: clock.compiled)
    monkeypatch.setattr(train.Loop, "_step_function", slow)
    run(lenet(log__every_seconds=1e6, data__placement="device"), tmp_path)
    first, second, _ = (r["seconds"] for r in loops[0].history if r["split"] == "train")
    assert first == pytest.approx(second - 0.25, abs=0.01)
    assert second == pytest.approx(loops[0].experiment.order.steps_per_epoch, abs=0.01)


def test_the_progress_bar_fetches_once_every_so_many_seconds(tmp_path, monkeypatch, loops):
    watch = Watch(monkeypatch)
    seconds = [0.0]

    def monotonic():
        seconds[0] += 0.5
        return seconds[0]

    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=monotonic))
    shown = []
    update = train.Progress.update
    monkeypatch.setattr(
        train.Progress,
        "update",
        lambda self, step, **totals: (
            (shown.append(totals) if totals else None) or update(self, step, **totals)
        ),
    )
    run(lenet(log__every_seconds=1.0, train__epochs=6), tmp_path)
    for_progress = watch.fetches - 2 * 6
    assert 0 < for_progress <= seconds[0] / 1.0
    assert for_progress == len(shown)
    assert watch.others == 0
    first = records(loops[0].history, "train")[0]
    assert all(np.isfinite([totals["loss"], totals["accuracy"]]).all() for totals in shown)
    np.testing.assert_allclose(shown[0]["loss"], first["loss"], rtol=0.5)


def test_a_run_that_gets_no_better_slows_down_stops_and_keeps_its_best(tmp_path, loops):
    # A learning rate of nothing: the training loss still differs from epoch to epoch, by the
    # examples that are dropped, and so the best of it is another epoch than the last.
    config = lenet(
        optimizer__learning_rate=1e-9,
        schedule__name="plateau",
        schedule__patience=0,
        schedule__factor=0.5,
        schedule__min_delta=1e-3,
        train__epochs=10,
        train__stop_by="val/loss",
        train__patience=3,
        train__min_delta=1e-3,
        train__best_by="train/loss",
        checkpoint__keep=1,
    )
    summary = run(config, tmp_path)
    history = loops[0].history
    trained = records(history, "train")
    assert [record["epoch"] for record in trained] == [1, 2, 3, 4], "three without any progress"

    losses = [record["loss"] for record in records(history, "val")]
    scales = [
        plateau_scale(losses[:n], mode="min", factor=0.5, patience=0, min_delta=1e-3)
        for n in range(4)
    ]
    assert scales[0] == 1
    assert scales[3] < scales[2] < 1
    np.testing.assert_allclose(
        [record["learning_rate"] for record in trained], 1e-9 * np.array(scales), rtol=1e-6
    )

    best = min(trained, key=lambda record: record["loss"])
    assert summary["best_epoch"] == best["epoch"]
    assert saved_steps(tmp_path) == sorted({best["step"], trained[-1]["step"]})
    val = find_record(history, best["epoch"], "val")
    np.testing.assert_allclose(summary["val"]["loss"], val["loss"], rtol=1e-12)
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == history
    for record in trained:
        assert 0 <= record["wait_share"] <= 1

    # What has stopped early stays so, and takes no step more.
    again = run(config, tmp_path)
    assert again == summary
    assert len(loops) == 1


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize(
    ("growth", "every_steps", "message"),
    [
        # The second epoch's first update is huge, so that the next step's loss overflows;
        (1e25, 0, "the loss is not finite at step {bad}"),
        # or not even that is finite, while the loss before it still was.
        (1e45, 1, "the parameters are not finite after step {after}"),
    ],
)
def test_what_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    growth, every_steps, message, tmp_path, loops
):
    config = lenet(
        schedule__name="step",
        schedule__step_epochs=1,
        schedule__gamma=growth,
        checkpoint__every_steps=every_steps,
    )
    with pytest.raises(InputError) as raised:
        run(config, tmp_path)
    steps = loops[0].experiment.order.steps_per_epoch
    message = message.format(bad=steps + 2, after=steps + 1)
    assert message in str(raised.value)
    assert f"(epoch 2); the last good checkpoint is step {steps};" in str(raised.value)
    assert saved_steps(tmp_path)[-1] == steps
    assert [record["epoch"] for record in loops[0].history] == [1, 1]


class FakeTime:
    """A clock that moves only when something takes time."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


class FakeBatches:
    """A feed whose batches take some seconds each where they are not ready."""

    def __init__(self, clock, seconds, ready):
        self.clock, self.seconds, self.ready = clock, seconds, ready

    def __next__(self):
        self.clock.now += self.seconds
        return 1, "batch"


@pytest.mark.parametrize(("ready", "waited"), [(False, 30.0), (True, 0.0)])
def test_waiting_counts_only_while_the_devices_have_nothing_to_do(ready, waited, monkeypatch):
    clock = FakeTime()
    monkeypatch.setattr(train, "time", clock)

    def finish_a_step():
        clock.now += 5

    loop = train.Loop.__new__(train.Loop)
    loop._in_flight = collections.deque(
        [SimpleNamespace(block_until_ready=finish_a_step) for _ in range(2)]
    )
    epoch = train.EpochClock(clock.now, 0)
    batches = FakeBatches(clock, 0 if ready else 3, ready)
    for _ in range(10):
        assert loop._next(batches, epoch) == (1, "batch")
    assert epoch.waited == waited
    assert clock.now == waited + (0 if ready else 10)
