"""Evaluation of a finished run: restores a checkpoint, measures it exactly, saves predictions."""

from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from flaxcls import runlog
from flaxcls.checkpoint import Checkpoints
from flaxcls.errors import InputError
from flaxcls.evaluate import Evaluator, write_predictions
from flaxcls.experiment import Experiment, for_evaluation
from flaxcls.history import best_record
from flaxcls.progress import Progress, evaluation_table


def evaluate_run(config: ConfigDict, workdir: Path, notes: list[str]) -> dict[str, Any]:
    """Evaluates the best checkpoint of a run, or that of `eval.step`, on `eval.split`.

    Writes `predictions/SPLIT.npz`, `.csv` and `.json` (the metrics); data other than the run's go
    under `predictions/NAME-SPLIT`.

    Returns:
      The metrics.

    Raises:
      InputError: the folder holds no finished epoch, or model, data and checkpoint do not fit.
    """
    described = workdir / "preprocess.json"
    if not described.is_file() or not (workdir / "checkpoints").is_dir():
        raise InputError(
            f"--workdir: '{workdir}' holds no checkpoint of a run; train it first, or give the "
            "folder of another run"
        )
    trained = runlog.read_json(described)
    experiment = for_evaluation(config, trained)
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        step, variables = restore_variables(experiment, checkpoints)
    (key, feed), *_ = experiment.data.feeds.items()
    evaluator = Evaluator(experiment)
    result = evaluator(variables, key, keep_logits=True)
    split = config.eval.split if config.eval.split == "all" else key
    own = experiment.data.fingerprint == trained["fingerprint"] or split in trained["splits"]
    del own
    name = output_name(experiment, trained)
    if jax.process_index() == 0:
        dataset = experiment.data.dataset
        folder = workdir / "predictions"
        write_predictions(folder, name, feed.split, result.logits, dataset.class_names)
        runlog.write_json(folder / f"{name}.json", {"step": step, "split": split, **result.record})
    with Progress(
        epochs=1, steps_per_epoch=1, batch_size=1, enabled=jax.process_index() == 0
    ) as progress:
        for note in (*notes, *experiment.data.notes):
            progress.note(note)
    return result.record
