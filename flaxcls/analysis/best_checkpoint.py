"""Which checkpoint of a run is used, and how it is read while the run may be training."""

import time

import jax

from flaxcls.checkpoint import Checkpoints, DamagedCheckpoint, Restored
from flaxcls.errors import InputError
from flaxcls.experiment import Experiment
from flaxcls.history import best_record

# Keys that evaluation may have otherwise than training, besides those that resuming may.
FREE = (
    "data.source",
    "data.name",
    "data.label_pattern",
    "data.on_bad",
    "data.prefetch",
    "eval.top_k",
    "train.epochs",
)

# Seconds until each next attempt to read a checkpoint, which a run that trains may be removing.
PAUSES = (0.0, 0.2, 1.0, None)


def restore(checkpoints: Checkpoints, experiment: Experiment) -> Restored:
    """Returns the checkpoint of `eval.step`, or the best.

    Raises:
      InputError: there is no complete checkpoint, none of that step, or it is damaged.
    """
    wanted = experiment.abstract_state(), experiment.abstract_metrics()
    for pause in PAUSES:
        try:
            step = experiment.config.eval.step or best_step(checkpoints)
            return checkpoints.restore(step, *wanted)
        except DamagedCheckpoint:
            # Several processes would choose differently, and wait for each other for ever.
            if pause is None or jax.process_count() > 1:
                raise
            time.sleep(pause)
            checkpoints.reload()
    raise AssertionError("the last attempt returns or raises")


def best_step(checkpoints: Checkpoints) -> int:
    """Returns the step of the best checkpoint that is there, or of the last where none is judged.

    The history is that of the newest checkpoint, which is whole; `metrics.jsonl` may be cut off.

    Raises:
      InputError: there is no complete checkpoint, or the newest is damaged.
    """
    steps = checkpoints.steps()
    if not steps:
        raise InputError(f"{checkpoints.directory}: no complete checkpoint; train the run first")
    log = checkpoints.read_log(steps[-1])
    kept = [record for record in log["history"] if record["step"] in steps]
    best = best_record(kept, log["best_by"])
    return best["step"] if best is not None else steps[-1]
