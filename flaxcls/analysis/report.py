"""Evaluation of a finished run: restores a checkpoint, measures it exactly, saves predictions.

What was measured becomes a report, `report.html` and `report.json`; see `report_page`.
"""

import re
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from flaxcls import config as config_module
from flaxcls import runlog
from flaxcls.analysis.best_checkpoint import FREE, restore
from flaxcls.analysis.pictures import save_pictures
from flaxcls.analysis.predictions import read_predictions
from flaxcls.analysis.report_page import write_report
from flaxcls.checkpoint import Checkpoints
from flaxcls.data.dataset import named
from flaxcls.errors import InputError, out_of_memory
from flaxcls.evaluate import Evaluator, write_predictions
from flaxcls.experiment import for_evaluation, image_spec
from flaxcls.history import scalars
from flaxcls.progress import make_console, metrics_table, show
from flaxcls.results import read_description
from flaxcls.sharding import fetch, replicated

# Of `data`: they say whether the data may be others than the run's.
OTHER_DATA = ("source", "path", "name", "label_pattern")


def evaluate_run(config: ConfigDict, workdir: Path, notes: list[str]) -> dict[str, Any]:
    """Evaluates the best checkpoint of a run, or that of `eval.step`, on `eval.split`.

    Writes `predictions/SPLIT.npz`, `.csv`, `.json` (the metrics) and `-images.npz` (what the report
    shows), and a report of them: `report.html` and `report.json`, or beside the predictions where
    `report_page.report_path` says so. A given step makes that SPLIT-stepN, and data other than the
    run's NAME-FINGERPRINT-SPLIT, so that what the summary rests on stays. The run may be training
    meanwhile.

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
    # All processes take part, since the state may be shared out between them.
    gather = jax.jit(lambda tree: tree, out_shardings=replicated(experiment.mesh))
    on_host = fetch(gather(variables))
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
        spec, predictions = image_spec(config), read_predictions(workdir, name)
        save_pictures(workdir, predictions, split, spec, experiment.recipe, on_host)
        show(console, f"the report, to be opened in a browser, is {write_report(workdir, name)}")
    return result.record


def missing_classes(support: list[int]) -> list[str]:
    """Returns a note where some classes have no examples: what the macro means are over then."""
    missing = support.count(0)
    if not missing:
        return []
    return [
        f"{missing} of {len(support)} classes have no examples here; the macro means of precision, "
        "recall and F1 are over the classes that occur in truth or prediction"
    ]
