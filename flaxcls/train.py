"""The training loop: epochs of compiled steps, validation, checkpoints, and the end of a run."""

import collections
import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from flaxcls import metrics, ops, runlog
from flaxcls.checkpoint import Checkpoints
from flaxcls.compilation import compile_seconds
from flaxcls.data.dataset import class_counts
from flaxcls.data.loader import DeviceIterator
from flaxcls.errors import InputError, another_workdir, out_of_memory
from flaxcls.evaluate import Evaluator
from flaxcls.experiment import Experiment, for_training, imported_weights
from flaxcls.history import Record, best_record, metric_mode, should_stop
from flaxcls.memory import peak_memory
from flaxcls.optimizers import plateau_scale
from flaxcls.progress import Progress
from flaxcls.results import RunFiles, other_data
from flaxcls.sharding import equal_everywhere, fetch, put_replicated, replicated
from flaxcls.step import Totals, compile_train_step


class Interrupted(Exception):
    """The run was asked to stop, has saved itself, and can be resumed.

    Attributes:
      signal_number: of the signal that asked.
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


class StopRequest:
    """Remembers SIGTERM and Ctrl-C while the loop runs; a second one stops at once.

    Before and after the loop there is nothing to save, and signals act as they did before. With
    several processes a signal to one of them stops all, after the same step.

    Attributes:
      signal_number: of the signal that came, 0 for none.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._before: dict[int, Any] = {}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may handle signals
            return
        if jax.process_count() == 1:
            handlers = {signal.SIGTERM: self._remember, signal.SIGINT: self._remember}
        else:  # JAX handles SIGTERM itself: it tells the other processes
            handlers = {signal.SIGINT: self._pass_on}
        self._before = {number: signal.signal(number, h) for number, h in handlers.items()}
        try:
            yield
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: Any) -> None:
        del frame
        if self.signal_number:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
        self.signal_number = number

    def _pass_on(self, number: int, frame: Any) -> None:
        del frame
        signal.signal(number, self._before[number])
        signal.raise_signal(signal.SIGTERM)

    def agreed(self, steps: range) -> bool:
        """Whether to stop now that `steps` are done; several processes all answer the same."""
        # JAX names one step for all to stop at; it may lie within a call of several.
        if jax.process_count() > 1 and any(
            map(multihost_utils.reached_preemption_sync_point, steps)
        ):
            self.signal_number = signal.SIGTERM
        return self.signal_number != 0


def train(
    config: ConfigDict, workdir: Path, stop: StopRequest, notes: list[str], memory: str = ""
) -> dict[str, Any]:
    """Trains, or goes on training, the run in `workdir` and returns its summary.

    Args:
      config: resolved.
      workdir: the run folder; made where it is missing.
      stop: asked after each step.
      notes: sentences for the log that were written before the run began.
      memory: what `ops.prepare_process` did, for the log's line of the devices.

    Raises:
      InputError: the folder, the config or the data do not fit, or the loss is not finite.
      Interrupted: `stop` was requested; the run is saved.
    """
    with RunFiles(workdir, config) as files:
        if files.finished_summary is not None:
            files.show_finished()
            return files.finished_summary
        experiment = for_training(config, files.earlier)
        keep = config.checkpoint.keep
        with (
            Checkpoints(workdir / "checkpoints", keep) as checkpoints,
            Progress(
                epochs=config.train.epochs,
                steps_per_epoch=experiment.order.steps_per_epoch,
                batch_size=config.train.batch_size,
                placement=experiment.data.placement,
                every_seconds=config.log.every_seconds,
                enabled=jax.process_index() == 0,
            ) as progress,
        ):
            introduce(experiment, progress, notes, memory)
            loop = Loop(experiment, checkpoints, files, progress, stop)
            with out_of_memory(
                "lower train.batch_size, eval.batch_size or data.image_size, raise "
                "optimizer.accumulate, or name modules in train.remat"
            ):
                loop.restore_or_initialise()
                loop.run()
                return files.finish(
                    experiment,
                    loop.best_variables(),
                    loop.best,
                    loop.evaluator,
                    loop.history,
                    progress,
                )


def introduce(
    experiment: Experiment, progress: Progress, notes: list[str], memory: str = ""
) -> None:
    """Says what is about to be trained, on what, and what was done about `memory`."""
    config, dataset = experiment.config, experiment.data.dataset
    for note in (*notes, *experiment.data.notes):
        progress.note(note)
    order = experiment.order
    dropped = order.size % order.batch_size
    if dropped:
        progress.note(
            f"data: each epoch leaves out {dropped} of its {order.size} training examples "
            f"({100 * dropped / order.size:.0f} %), which do not fill a batch of "
            f"{order.batch_size}; a smaller train.batch_size leaves out fewer"
        )
    if dataset.skipped:
        progress.note(
            f"data: {len(dataset.skipped)} unreadable files skipped: {', '.join(dataset.skipped)}"
        )
    devices = experiment.mesh.devices.flatten()
    count, trained = experiment.count_parameters(), experiment.count_trained_parameters()
    progress.note(
        f"model: {config.model.name}, {count:,} parameters"
        + (f" ({trained:,} of them trained)" if trained < count else "")
        + f", {config.precision}, on {len(devices)} x {devices[0].device_kind}"
        + "".join(f"; {said}" for said in (ops.native_status(), memory) if said)
    )
    counts = {key: value.tolist() for key, value in class_counts(dataset).items()}
    progress.class_counts(dataset.class_names, counts)


@dataclasses.dataclass
class EpochClock:
    """Times of a running epoch.

    Attributes:
      began: `time.monotonic()` at its start, compilation left out.
      first_step: the step it began or was resumed at.
      waited: seconds that the devices had nothing to do because no batch was ready.
    """

    began: float
    first_step: int
    waited: float = 0.0


class Loop:
    """A run between its first and its last step; everything that a checkpoint holds is here."""

    def __init__(
        self,
        experiment: Experiment,
        checkpoints: Checkpoints,
        files: RunFiles,
        progress: Progress,
        stop: StopRequest,
    ):
        self.experiment = experiment
        self.config = experiment.config
        self.checkpoints = checkpoints
        self.files = files
        self.progress = progress
        self.stop = stop
        self.evaluator = Evaluator(experiment)
        self.history: list[Record] = []
        self.step = 0
        self._sharding = experiment.state_sharding()
        self._empty_metrics = jax.jit(
            experiment.empty_metrics, out_shardings=replicated(experiment.mesh)
        )
        self._all_finite = jax.jit(_all_finite)
        self._steps: dict[int, Any] = {}
        self._in_flight: collections.deque[Any] = collections.deque()
        self._reported: Totals | None = None
        self._report_due = 0.0
        self._compiled = 0.0  # seconds, when times were last recorded

    def restore_or_initialise(self) -> None:
        restored = self.checkpoints.restore_latest(
            self.experiment.abstract_state(), self.experiment.abstract_metrics()
        )
        if restored is None:
            self.state = jax.jit(
                self.experiment.create_state,
                out_shardings=self._sharding,
                compiler_options=ops.compiler_options(),
            )()
            self.metrics = self._empty_metrics()
            self._take_weights()
        else:
            if restored.log["data"] != self.experiment.data.fingerprint:
                raise other_data(self.files.folder)
            self.state, self.metrics = restored.state, restored.metrics
            self.step, self.history = restored.step, restored.log["history"]
            for damaged in restored.damaged:
                self.progress.note(f"the checkpoint of step {damaged} is damaged and left out")
            self.progress.note(f"resumed: step {self.step}, from {self.files.folder}")
        self.files.begin(self.experiment, self.history)
        self._compiled = compile_seconds()

    def _take_weights(self) -> None:
        """Puts imported weights in the place of those that were drawn."""
        found = imported_weights(self.config, self.experiment.recipe, self.experiment.weights)
        if found is None:
            return
        imported, report = found
        if not equal_everywhere(report.origin.version):
            raise InputError(
                f"the processes of the run found different weights under {report.origin}; give "
                "all of them the same file, or name a revision of the hub: NAME@REVISION"
            )
        self.progress.note(str(report))

        def taken(new: Any, drawn: jax.Array) -> jax.Array:
            if not isinstance(new, np.ndarray):
                return drawn
            # Not the array's own memory: the step overwrites its state.
            return jax.make_array_from_callback(
                new.shape, drawn.sharding, lambda index: new[index].copy()
            )

        by_path = flatten_dict(imported, keep_empty_nodes=True)

        def replaced(drawn: Any) -> Any:
            leaves = flatten_dict(drawn, keep_empty_nodes=True)
            return unflatten_dict({path: taken(by_path[path], d) for path, d in leaves.items()})

        state = self.state
        variables = replaced({"params": state.params, "batch_stats": state.batch_stats})
        ema = None if state.ema is None else replaced(state.ema)
        self.state = state.replace(**variables, ema=ema)

    def run(self) -> None:
        """Trains until the last epoch or until early stopping."""
        order, config = self.experiment.order, self.config
        if self.step >= len(order) or self._stopped_early():
            return
        feed = self.experiment.data.feeds["train"]
        batches = feed.train(
            order,
            self.experiment.recipe.augmentation,
            start=self.step,
            chunk=config.train.steps_per_call,
        )
        with self.stop.listening(), batches:
            while self.step < len(order) and not self._stopped_early():
                epoch = self.step // order.steps_per_epoch + 1
                records = [self._train_epoch(epoch, batches)]
                if "val" in self.experiment.data.feeds:
                    records.append(self._validate(epoch))
                self._end_epoch(records)
        self.checkpoints.wait()

    def _train_epoch(self, epoch: int, batches: DeviceIterator) -> Record:
        steps_per_epoch = self.experiment.order.steps_per_epoch
        resident = self.experiment.data.feeds["train"].resident
        clock = EpochClock(time.monotonic(), self.step)
        self._report_due = clock.began + self.config.log.every_seconds
        self.progress.start(epoch, "train", step=self.step % steps_per_epoch)
        while self.step < epoch * steps_per_epoch:
            count, batch = self._next(batches, clock)
            first_call, compiled = count not in self._steps, compile_seconds()
            self.state, self.metrics, totals = self._step_function(count)(
                self.state, self.metrics, batch, resident
            )
            if first_call:
                seconds = compile_seconds() - compiled
                clock.began += seconds
                jax.block_until_ready(totals)
                self.progress.note(
                    f"compiled the training step in {seconds:.1f} s; the first step ended "
                    f"{runlog.seconds_since_start():.1f} s after the command"
                )
            self.step += count
            self._keep_pace(totals)
            self._report(totals, self.step - (epoch - 1) * steps_per_epoch)
            self._save_within_epoch(epoch, count, totals)
        return self._close_epoch(epoch, totals, clock)

    def _step_function(self, count: int) -> Any:
        """Returns the step, or the scan over `count` steps, which its first call compiles."""
        if count not in self._steps:
            self._steps[count] = compile_train_step(
                self.experiment.recipe, self._sharding, replicated(self.experiment.mesh), count
            )
        return self._steps[count]

    def _next(self, batches: DeviceIterator, clock: EpochClock) -> tuple[int, Any]:
        """Takes a batch; time counts as waiting only once the devices have nothing left to do."""
        if batches.ready:
            return next(batches)
        while self._in_flight:
            self._in_flight.popleft().block_until_ready()
        began = time.monotonic()
        item = next(batches)
        clock.waited += time.monotonic() - began
        return item

    def _keep_pace(self, totals: Totals) -> None:
        """Stays two steps ahead of the devices: enough to keep them busy, and no more memory."""
        self._in_flight.append(totals.learning_rate)
        if len(self._in_flight) > 2:
            self._in_flight.popleft().block_until_ready()

    def _report(self, totals: Totals, step: int) -> None:
        """Shows the running loss every few seconds, from copies that nothing waits for."""
        now = time.monotonic()
        if self._reported is not None and self._reported.learning_rate.is_ready():
            host = fetch(self._reported)
            self._reported = None
            if jax.process_count() == 1:  # several would stop at different steps
                self._check_finite(host.metrics.first_bad_step)
            loss, accuracy = metrics.running(host.metrics)
            self.progress.update(step, loss=loss, accuracy=accuracy)
        elif now >= self._report_due:
            self._report_due = now + self.config.log.every_seconds
            for leaf in jax.tree.leaves(totals):
                leaf.copy_to_host_async()
            self._reported = totals
        else:
            self.progress.update(step)

    def _save_within_epoch(self, epoch: int, count: int, totals: Totals) -> None:
        order, every = self.experiment.order, self.config.checkpoint.every_steps
        just_taken = range(self.step - count + 1, self.step + 1)
        stopping = self.stop.agreed(just_taken)
        if self.step == epoch * order.steps_per_epoch:
            return  # the epoch's end saves after validation
        if stopping or (every and any(step % every == 0 for step in just_taken)):
            self._check_finite(
                *fetch((totals.metrics.first_bad_step, self._all_finite(self.state)))
            )
            self._save()
        if stopping:
            self._leave()

    def _close_epoch(self, epoch: int, totals: Totals, clock: EpochClock) -> Record:
        finite = self._all_finite(self.state)
        host, learning_rate, finite = fetch((self.metrics, totals.learning_rate, finite))
        seconds = time.monotonic() - clock.began
        self._in_flight.clear()
        self._reported = None
        self._check_finite(host.first_bad_step, finite)
        self.metrics = self._empty_metrics()
        images = (self.step - clock.first_step) * self.experiment.order.batch_size
        return {
            "epoch": epoch,
            "split": "train",
            "step": self.step,
            **metrics.compute(host),
            "learning_rate": float(learning_rate),
            "seconds": seconds,
            "images_per_second": images / seconds,
            "wait_share": clock.waited / seconds,
            "peak_memory_bytes": peak_memory(),
            **self._process_times(),
        }

    def _process_times(self) -> dict[str, float]:
        """What a record that is made now says of this process.

        Returns:
          `elapsed_seconds` since its command, and `compile_seconds` of them since the last record.
        """
        before, self._compiled = self._compiled, compile_seconds()
        return {
            "compile_seconds": self._compiled - before,
            "elapsed_seconds": runlog.seconds_since_start(),
        }

    def _validate(self, epoch: int) -> Record:
        feed, began = self.experiment.data.feeds["val"], time.monotonic()
        steps = -(-len(feed.split) // self.experiment.eval_batch_size)
        self.progress.start(epoch, "val", steps=steps)
        result = self.evaluator(self.state.variables(), "val", on_step=self.progress.update)
        seconds = time.monotonic() - began
        if result.first_bad_step >= 0:
            raise self._diverged(f"the validation loss is not finite after step {self.step}")
        return {
            "epoch": epoch,
            "split": "val",
            "step": self.step,
            **result.record,
            "seconds": seconds,
            "images_per_second": len(feed.split) / seconds,
            **self._process_times(),
        }

    def _end_epoch(self, records: list[Record]) -> None:
        self.history += records
        self._lower_learning_rate()
        best = best_record(self.history, self.experiment.best_by)
        is_best = best is not None and best["step"] == self.step
        self._save()
        self.files.add_records(records)
        self.progress.end_epoch(records, best=is_best)
        if self.stop.signal_number:
            self._leave()

    def _lower_learning_rate(self) -> None:
        schedule = self.config.schedule
        if schedule.name != "plateau":
            return
        split, metric = schedule.monitor.split("/")
        scale = plateau_scale(
            [record[metric] for record in self.history if record["split"] == split],
            mode=metric_mode(schedule.monitor),
            factor=schedule.factor,
            patience=schedule.patience,
            min_delta=schedule.min_delta,
            cooldown=schedule.cooldown,
            min_scale=schedule.min_scale,
        )
        scale_array = put_replicated(np.float32(scale), self.experiment.mesh)
        self.state = self.state.replace(learning_rate_scale=scale_array)

    def _stopped_early(self) -> bool:
        t = self.config.train
        if not t.patience or self.step % self.experiment.order.steps_per_epoch:
            return False
        return should_stop(self.history, t.stop_by, t.patience, t.min_delta)

    def _save(self) -> None:
        best = best_record(self.history, self.experiment.best_by)
        log = {
            "history": self.history,
            "best_by": self.experiment.best_by,
            "data": self.experiment.data.fingerprint,
        }
        best_step = best["step"] if best is not None else None
        self.checkpoints.save(self.step, self.state, self.metrics, log, best_step)

    def _leave(self) -> None:
        self.checkpoints.wait()
        raise Interrupted(
            f"stopped by {signal.Signals(self.stop.signal_number).name} and saved at step "
            f"{self.step}; to resume: {self.files.resume_command()}",
            self.stop.signal_number,
        )

    def _check_finite(self, first_bad_step: int, finite_state: bool = True) -> None:
        """Stops the run where a loss, or a parameter after the last step, is not finite."""
        if first_bad_step >= 0:
            raise self._diverged(f"the loss is not finite at step {first_bad_step + 1}")
        if not finite_state:
            raise self._diverged(f"the parameters are not finite after step {self.step}")

    def _diverged(self, what: str) -> InputError:
        self.checkpoints.wait()
        steps = self.checkpoints.steps()
        kept = f"the last good checkpoint is step {steps[-1]}" if steps else "nothing was saved yet"
        epoch = (self.step - 1) // self.experiment.order.steps_per_epoch + 1
        return InputError(
            f"{what} (epoch {epoch}); {kept}; "
            f"train into {another_workdir(self.files.folder)} with a lower "
            "optimizer.learning_rate, or clip the gradients with optimizer.clip_norm"
        )

    @property
    def best(self) -> Record | None:
        """The best record whose checkpoint is there; a damaged one may have been set aside."""
        steps = {*self.checkpoints.steps(), self.step}
        kept = [record for record in self.history if record["step"] in steps]
        return best_record(kept, self.experiment.best_by)

    def best_variables(self) -> Any:
        """Returns the variables of the best checkpoint, on the devices."""
        best = self.best
        if best is None or best["step"] == self.step:
            return self.state.variables()
        del self.state  # two states may not fit
        return self.checkpoints.restore(
            best["step"], self.experiment.abstract_state(), self.experiment.abstract_metrics()
        ).state.variables()


def _all_finite(state: Any) -> jax.Array:
    leaves = jax.tree.leaves(state.variables())
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))
