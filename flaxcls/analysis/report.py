"""Evaluation of a finished run: restores a checkpoint, measures it exactly, saves predictions."""

import re
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from flaxcls import runlog
from flaxcls.checkpoint import Checkpoints
from flaxcls.errors import InputError
from flaxcls.evaluate import Evaluator, write_predictions
from flaxcls.experiment import Experiment, for_evaluation
from flaxcls.history import best_record, scalars
from flaxcls.progress import make_console, metrics_table, show
from flaxcls.results import read_description


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
    experiment = for_evaluation(config, read_description(workdir))
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        step, variables, more = restore_variables(experiment, checkpoints)
    (key, feed), *_ = experiment.data.feeds.items()
    result = Evaluator(experiment)(variables, key, keep_logits=True)
    name = predictions_name(experiment)
    if jax.process_index() == 0:
        folder, classes = workdir / "predictions", experiment.data.dataset.class_names
        write_predictions(folder, name, feed.split, result.logits, classes)
        runlog.write_json(folder / f"{name}.json", {"step": step, **result.record})
        console = make_console()
        for note in (*notes, *experiment.data.notes, *more):
            show(console, note)
        show(console, metrics_table({name: scalars(result.record)}))
        show(
            console,
            f"{len(feed.split)} examples, checkpoint of step {step}; every example's prediction is "
            f"in {folder / name}.csv",
        )
    return result.record


def restore_variables(
    experiment: Experiment, checkpoints: Checkpoints
) -> tuple[int, Any, list[str]]:
    """Returns step and variables of the checkpoint of `eval.step`, or of the best, and notes."""
    state, epoch = experiment.abstract_state(), experiment.abstract_metrics()
    step = experiment.config.eval.step
    if not step:
        latest = checkpoints.restore_latest(state, epoch)
        if latest is None:
            raise InputError(
                f"{checkpoints.directory}: no complete checkpoint; train the run first"
            )
        notes = [
            f"the checkpoint of step {damaged} is damaged: this is the best of those before it"
            for damaged in latest.damaged
        ]
        best = best_record(latest.log["history"], latest.log["best_by"])
        if best is None or best["step"] == latest.step:
            return latest.step, latest.state.variables(), notes
        step = best["step"]
        del latest  # two states may not fit
        return step, checkpoints.restore(step, state, epoch).state.variables(), notes
    return step, checkpoints.restore(step, state, epoch).state.variables(), []


def predictions_name(experiment: Experiment) -> str:
    """Returns SPLIT for the run's own data and DATASET-SPLIT for others."""
    split = experiment.config.eval.split
    if experiment.own_data:
        return split
    return re.sub(r"[^\w.-]+", "-", f"{Path(experiment.data.dataset.name).name}-{split}")
