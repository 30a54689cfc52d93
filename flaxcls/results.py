"""What a run leaves in its folder, from its config to the predictions of its best checkpoint."""

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from flaxcls import config as config_module
from flaxcls import pretrained, runlog
from flaxcls.checkpoint import check_directory
from flaxcls.compilation import compile_seconds
from flaxcls.data.dataset import class_counts, fingerprint, named
from flaxcls.data.decode import RESAMPLER
from flaxcls.data.load import check_run_folder
from flaxcls.errors import InputError, another_workdir
from flaxcls.evaluate import Evaluator, write_predictions
from flaxcls.events import Events
from flaxcls.experiment import Experiment, image_spec, read_dataset, stored_images
from flaxcls.experiment.recipe import model_options
from flaxcls.history import Record, summary
from flaxcls.models import create_model
from flaxcls.progress import Progress, closing, make_console, show
from flaxcls.sharding import fetch, replicated

FORMAT_VERSION = 1
PREVIOUS_SUMMARY = "summary.previous.json"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_scores(value: Any) -> bool:
    """Metrics by name, or None where the split was not measured."""
    return value is None or (
        isinstance(value, dict)
        and all(score is None or runlog.is_number(score) for score in value.values())
    )


def _each(is_one: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) > 0 and all(map(is_one, value))


def _is_origin(value: Any) -> bool:
    """What `describe` writes of a `pretrained.Origin`, or None without one."""
    return value is None or (
        isinstance(value, dict)
        and value.keys() == {"source", "commit", "sha256"}
        and _is_text(value["source"])
        and all(value[key] is None or _is_text(value[key]) for key in ("commit", "sha256"))
    )


def _is_lesson(value: Any) -> bool:
    """What `deploy.teach` writes of a class that it taught."""
    return isinstance(value, dict) and all(map(_is_text, (value.get("name"), value.get("method"))))


# What is read again of `summary.json` and of `preprocess.json`, and what it must be.
SUMMARY_KINDS = {
    "model": _is_text,
    "params": runlog.is_count,
    "best_epoch": runlog.is_count,
    "epochs": runlog.is_count,
    "seconds": runlog.is_number,
    "images_per_second": lambda value: value is None or runlog.is_number(value),
    "val": _is_scores,
    "test": _is_scores,
}
DESCRIPTION_KINDS = {
    "class_names": _each(_is_text),
    "class_counts": _each(runlog.is_count),
    "mean": _each(runlog.is_number),
    "std": _each(runlog.is_number),
    "placement": _is_text,
    "fingerprint": _is_text,
    "weights": _is_origin,
    "resampler": _is_text,
    "taught": lambda value: isinstance(value, list) and all(map(_is_lesson, value)),
}


class RunFiles:
    """The files of one run, apart from its checkpoints; only the first process writes.

    Opening refuses a folder that belongs to another config or to another process, that lies among
    the data, or whose run is finished and was of other data. A context manager.

    Attributes:
      folder: of the run.
      finished_summary: the run's `summary.json` where there is nothing left to do, else None.
      earlier: the run's `preprocess.json` where it is resumed, else None.
    """

    def __init__(self, folder: Path, config: ConfigDict):
        self._opened = runlog.seconds_since_start(), compile_seconds()
        check_run_folder(folder, config.data.source, config.data.path)
        self.folder = folder
        self.writes = jax.process_index() == 0
        self._config = config
        self._lock = runlog.RunFolder(folder) if self.writes else contextlib.nullcontext()
        self._events: Events | None = None
        try:
            check_directory(folder / "checkpoints")
            self.finished_summary = self._compare(folder / "config.json")
            self.earlier = (
                read_description(folder) if (folder / "preprocess.json").exists() else None
            )
        except BaseException:
            self._release()
            raise

    def __enter__(self) -> "RunFiles":
        return self

    def __exit__(self, *_: object) -> None:
        if self._events is not None:
            self._events.close()
        self._release()

    def _release(self) -> None:
        if isinstance(self._lock, runlog.RunFolder):
            self._lock.close()

    def _compare(self, path: Path) -> dict[str, Any] | None:
        if not path.exists():
            if any((self.folder / "checkpoints").glob("[0-9]*")):
                raise InputError(
                    f"'{self.folder}' holds checkpoints but no config.json, so that nothing says "
                    f"what they are of; restore that file or give {another_workdir(self.folder)}"
                )
            return None
        stored = config_module.load(path)
        differing = config_module.differences(stored, self._config)
        if differing:
            _check_names(self._config)  # a misspelt one makes no other run
            raise InputError(
                f"{self.folder} holds a run with another config ({'; '.join(differing)}); "
                f"give {another_workdir(self.folder)}, or the same config to resume"
            )
        done = self.folder / "summary.json"
        if done.exists() and stored.train.epochs >= self._config.train.epochs:
            if stored.data.path != self._config.data.path:
                trained_on = read_description(self.folder)["fingerprint"]
                if fingerprint(read_dataset(self._config)) != trained_on:
                    raise other_data(self.folder)
            return read_summary(self.folder)
        self._refuse_taught()
        return None

    def _refuse_taught(self) -> None:
        """Training knows the classes of the data, and a taught run has others."""
        path = self.folder / "preprocess.json"
        taught = read_description(self.folder)["taught"] if path.exists() else []
        if taught:
            names = ", ".join(repr(lesson["name"]) for lesson in taught)
            raise InputError(
                f"{self.folder} was taught {names} after its training, which cannot go on; put "
                f"images of that into the data and train into {another_workdir(self.folder)}"
            )

    def show_finished(self) -> None:
        """Prints the summary of a run that has nothing left to do."""
        if not self.writes:
            return
        history = runlog.read_metrics(self.folder / "metrics.jsonl")
        console = make_console()
        show(console, f"{self.folder} is finished; nothing to do")
        closed = closing(
            self.finished_summary or {}, history, str(self.folder), can_go_on=self._can_go_on()
        )
        for content in closed:
            show(console, content)

    def _can_go_on(self) -> bool:
        """Whether the run may be given more epochs."""
        return self._config.schedule.name in config_module.LENGTH_FREE_SCHEDULES

    def begin(self, experiment: Experiment, history: list[Record]) -> None:
        """Writes what is known before the first step of this process.

        Called once the checkpoint fits, so that a mistake changes nothing of an earlier run.
        `metrics.jsonl` and the events become those of `history`: what follows is done anew.
        """
        if not self.writes:
            return
        # A finished run that is given more epochs is not finished before it has a new summary.
        if (self.folder / "summary.json").exists():
            (self.folder / "summary.json").replace(self.folder / PREVIOUS_SUMMARY)
        with runlog.writing(self.folder):
            config_module.save(self._config, self.folder / "config.json")
        runlog.record_session(self.folder / "environment.json", self._start_up())
        images, labels, index = exemplars(experiment)
        runlog.write_json(self.folder / "preprocess.json", describe(experiment, images))
        names = np.array(experiment.data.dataset.class_names)
        arrays = {"image": images, "label": labels, "index": index, "class_names": names}
        runlog.write_arrays(self.folder / "exemplars.npz", arrays)
        runlog.write_metrics(self.folder / "metrics.jsonl", history)
        if self._config.log.tensorboard:
            self._events = Events(self.folder / "tensorboard", history)

    def _start_up(self) -> dict[str, float]:
        """Returns what the process did with its seconds until now, before the first step.

        `import_seconds` went by until the folder was opened. `data_seconds` is reading the data
        and putting them in their place, with what little there is besides compilation.
        """
        opened, compiled_before = self._opened
        compiling = compile_seconds() - compiled_before
        return {
            "import_seconds": opened,
            "data_seconds": runlog.seconds_since_start() - opened - compiling,
            "compile_seconds": compiling,
        }

    def add_records(self, records: list[Record]) -> None:
        if not self.writes:
            return
        for record in records:
            runlog.append_metrics(self.folder / "metrics.jsonl", record)
            if self._events is not None:
                self._events.add(record)

    def resume_command(self) -> str:
        return shlex.join(sys.orig_argv)

    def finish(
        self,
        experiment: Experiment,
        variables: Any,
        best: Record | None,
        evaluator: Evaluator,
        history: list[Record],
        progress: Progress,
    ) -> dict[str, Any]:
        """Evaluates the best variables, writes what a finished run holds, and shows the summary."""
        held_out = [split for split in ("val", "test") if split in experiment.data.feeds]
        results = {}
        for split in held_out:
            results[split] = evaluator(variables, split, keep_logits=True)
        gather = jax.jit(lambda tree: tree, out_shardings=replicated(experiment.mesh))
        on_host = fetch(gather(variables))
        test = results["test"].record if "test" in results else None
        summarised = summary(
            history,
            model=self._config.model.name,
            params=experiment.count_parameters(),
            monitor=experiment.best_by,
            best=best,
            test=test,
        )
        if not self.writes:
            return summarised
        dataset = experiment.data.dataset
        for split, result in results.items():
            write_predictions(
                self.folder / "predictions",
                split,
                named(dataset.splits[split], split),
                result.logits,
                dataset,
            )
        with runlog.writing(self.folder / "weights.safetensors"):
            pretrained.save(
                self.folder / "weights.safetensors",
                experiment.recipe.model,
                on_host,
                layout="flaxcls",
                about={
                    "model": self._config.model.name,
                    "mean": experiment.recipe.preprocess.mean,
                    "std": experiment.recipe.preprocess.std,
                },
            )
        if self._config.log.plots:
            # It imports matplotlib: half a second before the first step.
            from flaxcls.analysis.plots import plot_run

            shown = held_out[-1] if held_out else None
            plot_run(
                history,
                results[shown].confusion if shown else None,
                dataset.class_names,
                {key: counts.tolist() for key, counts in class_counts(dataset).items()},
                self.folder / "plots",
                monitor=experiment.best_by,
                **({"confusion_split": shown} if shown else {}),
            )
        runlog.write_json(self.folder / "summary.json", summarised)
        (self.folder / PREVIOUS_SUMMARY).unlink(missing_ok=True)
        progress.finish(summarised, history, str(self.folder), can_go_on=self._can_go_on())
        return summarised


def other_data(folder: Path) -> InputError:
    """What to raise where the data are not those of the run in `folder`."""
    return InputError(
        f"data.path: the data differ from those that {folder} was trained on; restore them, or "
        f"train into {another_workdir(folder)}"
    )


def read_summary(folder: Path) -> dict[str, Any]:
    """Returns the run's `summary.json`, as `history.summary` made it.

    Raises:
      InputError: the file is missing or damaged.
    """
    return _read_with(folder / "summary.json", SUMMARY_KINDS)


def read_description(folder: Path) -> dict[str, Any]:
    """Returns the run's `preprocess.json`, as `describe` made it.

    Raises:
      InputError: the file is missing, damaged, or of a later version of flaxcls.
    """
    path = folder / "preprocess.json"
    version = _read_with(path, {"format_version": runlog.is_count})["format_version"]
    if version != FORMAT_VERSION:
        raise InputError(
            f"'{path}' has format {version}, and this version of flaxcls reads format "
            f"{FORMAT_VERSION}; use the version that wrote it"
        )
    # The first runs of format 1 did not say what they started from, and had images from Pillow.
    # Nor does one whose classes are all from its training say that it was taught none.
    absent: dict[str, Any] = {"weights": None, "resampler": "pillow", "taught": []}
    described = _read_with(path, DESCRIPTION_KINDS, absent)
    counts, names = described["class_counts"], described["class_names"]
    if len(counts) != len(names):
        raise InputError(
            f"'{path}' has {len(counts)} counts for {len(names)} classes; restore or remove it"
        )
    return described


def _check_names(config: ConfigDict) -> None:
    """Refuses a model or options that there are not, and a path that leads nowhere."""
    create_model(config.model.name, 2, **model_options(config))
    path = config.data.path
    if path and not Path(path).expanduser().exists():
        raise InputError(f"data.path: {path!r} does not exist; give the folder or file of the data")


def _read_with(
    path: Path,
    kinds: Mapping[str, Callable[[Any], bool]],
    absent: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Reads a JSON object that must hold these keys, with values of these kinds.

    A key of `absent` may be missing, and then has the value there.
    """
    content = runlog.read_json(path)
    if isinstance(content, dict):
        content = {**(absent or {}), **content}
    for key, is_kind in kinds.items():
        if not isinstance(content, dict) or key not in content:
            raise InputError(f"'{path}' holds no {key!r}; restore or remove it")
        if not is_kind(content[key]):
            raise InputError(
                f"'{path}': {key!r} is {content[key]!r:.80}, which no run writes; restore or "
                "remove that file"
            )
    return content


def describe(experiment: Experiment, exemplars: np.ndarray) -> dict[str, Any]:
    """Returns `preprocess.json`: how an image becomes the model's input, and what classes mean.

    It says, too, what weights training started from, which may have brought the normalisation.
    The pixels' statistics are those of all training images, or of the exemplars where the others
    stay in their files.
    """
    spec, p = image_spec(experiment.config), experiment.recipe.preprocess
    dataset, stored = experiment.data.dataset, experiment.data.feeds["train"].split.images
    images = stored if isinstance(stored, np.ndarray) else exemplars
    return {
        "format_version": FORMAT_VERSION,
        "size": p.size,
        "channels": p.channels,
        "resize": spec.resize,
        "crop_fraction": spec.crop_fraction,
        "crop_order": spec.crop_order,
        "mean": p.mean,
        "std": p.std,
        "class_names": dataset.class_names,
        "parent_names": dataset.parent_names,
        "class_parents": dataset.class_parents,
        "class_counts": class_counts(dataset)["train"],
        "pixels": runlog.pixel_statistics(images),
        "resampler": RESAMPLER,
        "placement": experiment.data.placement,
        "fingerprint": experiment.data.fingerprint,
        "weights": dataclasses.asdict(experiment.weights) if experiment.weights else None,
    }


def exemplars(experiment: Experiment) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns some training images of each class, with their labels and indices.

    uint8 (M, S, S, C) at the size of training (images that are enlarged in the step, as they are
    stored), int32 (M,), int64 (M,).
    """
    train = experiment.data.dataset.splits["train"]
    spec = image_spec(experiment.config)
    index = runlog.choose_exemplars(train.labels, bytes_per_image=spec.size**2 * spec.channels)
    chosen = train.take(index)
    return stored_images(chosen, spec), chosen.labels, index
