"""Evaluation of a finished run: restores a checkpoint, measures it exactly, saves predictions."""

import re
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from flaxcls import config as config_module
from flaxcls import runlog
from flaxcls.checkpoint import Checkpoints, DamagedCheckpoint, Restored
from flaxcls.data.dataset import named
from flaxcls.errors import InputError, out_of_memory
from flaxcls.evaluate import Evaluator, write_predictions
from flaxcls.experiment import Experiment, for_evaluation
from flaxcls.history import best_record, scalars
from flaxcls.progress import make_console, metrics_table, show
from flaxcls.results import read_description

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
# Of `data`: they say whether the data may be others than the run's.
OTHER_DATA = ("source", "path", "name", "label_pattern")

# Seconds until each next attempt to read a checkpoint, which a run that trains may be removing.
PAUSES = (0.0, 0.2, 1.0, None)


def evaluate_run(config: ConfigDict, workdir: Path, notes: list[str]) -> dict[str, Any]:
    """Evaluates the best checkpoint of a run, or that of `eval.step`, on `eval.split`.

    Writes `predictions/SPLIT.npz`, `.csv` and `.json` (the metrics). A given step makes that
    SPLIT-stepN, and data other than the run's NAME-FINGERPRINT-SPLIT, so that what the summary
    rests on stays. The run may be training meanwhile.

    Returns:
      The metrics.

    Raises:
      InputError: the folder holds no finished epoch, or model, data and checkpoint do not fit.
    """
    if not (workdir / "preprocess.json").is_file() or not (workdir / "checkpoints").is_dir():
        raise InputError(
            f"--workdir: '{workdir}' holds no checkpoint of a run; train it first, or give the "
            "folder of another run"
        )
    stored, _ = config_module.resolve(config_module.load(workdir / "config.json"))
    differing = config_module.differences(stored, config, FREE)
    if differing:
        raise InputError(
            f"{workdir} was trained with another config ({'; '.join(differing)}); leave out "
            "--config and these keys to evaluate it as it was trained"
        )
    other_data = any(stored.data[key] != config.data[key] for key in OTHER_DATA)
    experiment = for_evaluation(config, read_description(workdir), other_data=other_data)
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        restored = restore(checkpoints, experiment)
    variables = restored.state.variables()
    (key, feed), *_ = experiment.data.feeds.items()
    with out_of_memory("lower eval.batch_size"):
        result = Evaluator(experiment)(variables, key, keep_logits=True)
    name = re.sub(r"[^\w.-]+", "-", experiment.evaluated)
    if config.eval.step:
        name += f"-step{config.eval.step}"
    if jax.process_index() == 0:
        folder, dataset = workdir / "predictions", experiment.data.dataset
        split = named(dataset.splits[key], key)
        write_predictions(folder, name, split, result.logits, dataset)
        runlog.write_json(folder / f"{name}.json", {"step": restored.step, **result.record})
        console = make_console()
        for note in (*notes, *experiment.data.notes, *missing_classes(result.record["support"])):
            show(console, note)
        show(console, metrics_table({name: scalars(result.record)}))
        show(
            console,
            f"{len(feed.split)} examples, checkpoint of step {restored.step}; every example's "
            f"prediction is in {folder / name}.csv",
        )
    return result.record


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


def missing_classes(support: list[int]) -> list[str]:
    """Returns a note where some classes have no examples: what the macro means are over then."""
    missing = support.count(0)
    if not missing:
        return []
    return [
        f"{missing} of {len(support)} classes have no examples here; the macro means of precision, "
        "recall and F1 are over the classes that occur in truth or prediction"
    ]
