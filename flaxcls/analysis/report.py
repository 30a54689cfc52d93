"""Evaluation of a finished run: restores a checkpoint, measures it exactly, saves predictions."""

import re
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from flaxcls import config as config_module
from flaxcls import runlog
from flaxcls.checkpoint import Checkpoints
from flaxcls.errors import InputError
from flaxcls.evaluate import Evaluator, write_predictions
from flaxcls.experiment import for_evaluation
from flaxcls.history import Record, best_record, scalars
from flaxcls.progress import make_console, metrics_table, show
from flaxcls.results import read_description

# Keys that evaluation may have otherwise than training, besides those that resuming may.
OTHER_DATA = ("data.source", "data.name", "data.on_bad", "data.prefetch", "train.epochs")


def evaluate_run(config: ConfigDict, workdir: Path, notes: list[str]) -> dict[str, Any]:
    """Evaluates the best checkpoint of a run, or that of `eval.step`, on `eval.split`.

    Writes `predictions/SPLIT.npz`, `.csv` and `.json` (the metrics); data other than the run's go
    under `predictions/NAME-SPLIT`.

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
    differing = config_module.differences(stored, config, OTHER_DATA)
    if differing:
        raise InputError(
            f"{workdir} was trained with another config ({'; '.join(differing)}); leave out "
            "--config and these keys to evaluate it as it was trained"
        )
    other_data = any(stored.data[key] != config.data[key] for key in ("source", "path", "name"))
    experiment = for_evaluation(config, read_description(workdir), other_data=other_data)
    history = runlog.read_metrics(workdir / "metrics.jsonl")
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        step = config.eval.step or best_step(checkpoints, history, config.train.best_by)
        restored = checkpoints.restore(
            step, experiment.abstract_state(), experiment.abstract_metrics()
        )
    variables = restored.state.variables()
    (key, feed), *_ = experiment.data.feeds.items()
    result = Evaluator(experiment)(variables, key, keep_logits=True)
    name = re.sub(r"[^\w.-]+", "-", experiment.evaluated)
    if jax.process_index() == 0:
        folder, classes = workdir / "predictions", experiment.data.dataset.class_names
        write_predictions(folder, name, feed.split, result.logits, classes)
        runlog.write_json(folder / f"{name}.json", {"step": step, **result.record})
        console = make_console()
        for note in (*notes, *experiment.data.notes):
            show(console, note)
        show(console, metrics_table({name: scalars(result.record)}))
        show(
            console,
            f"{len(feed.split)} examples, checkpoint of step {step}; every example's prediction is "
            f"in {folder / name}.csv",
        )
    return result.record


def best_step(checkpoints: Checkpoints, history: list[Record], best_by: str) -> int:
    """Returns the step of the best checkpoint that is there, or of the last where none is judged.

    Raises:
      InputError: there is no complete checkpoint.
    """
    steps = checkpoints.steps()
    if not steps:
        raise InputError(f"{checkpoints.directory}: no complete checkpoint; train the run first")
    if best_by == "auto":
        validated = any(record["split"] == "val" for record in history)
        best_by = "val/accuracy" if validated else "train/loss"
    best = best_record([record for record in history if record["step"] in steps], best_by)
    return best["step"] if best is not None else steps[-1]
