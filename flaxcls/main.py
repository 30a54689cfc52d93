"""The command line: flags to one function of one room.

python -m flaxcls.main --config=configs/vgg13.py
python -m flaxcls.main --mode=evaluate --workdir=runs/vgg13-digits
"""

import importlib
import importlib.resources
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from flaxcls import config as config_module
from flaxcls import ops
from flaxcls.errors import InputError

MODES = ("train", "evaluate", "summary")

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file, or the name of one that comes with flaxcls; the data set follows a colon: "
    "configs/vgg13.py:fashion_mnist, or vgg13. Keys are overridden with --config.group.key=value.",
    lock_config=True,
)
flags.DEFINE_enum("mode", "train", MODES, "What to do.")
flags.DEFINE_string("workdir", None, "Run folder; by default runs/CONFIG-DATASET.")
flags.DEFINE_string("coordinator", None, "HOST:PORT of the first process, for several processes.")
flags.DEFINE_integer("num_processes", None, "How many processes, with --coordinator.")
flags.DEFINE_integer("process_id", None, "Which of them this is, from 0, with --coordinator.")
flags.DEFINE_bool("debug", False, "Show the traceback of an error in the input.")


def run() -> None:
    """Console entry: runs the command of `sys.argv` and exits."""
    sys.exit(main(sys.argv))


def main(argv: Sequence[str]) -> int:
    """Runs one command and returns its exit code.

    0: done. 2: the input is wrong, in one sentence on standard error. 128 + n: stopped by signal
    n, saved, to be resumed.
    """
    debug = any(argument in ("--debug", "-debug", "--debug=true") for argument in argv)
    try:
        return _dispatch(argv)
    except InputError as error:
        if debug:
            raise
        print(f"flaxcls: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "flaxcls: stopped; the same command resumes from the last checkpoint", file=sys.stderr
        )
        return 130


def _dispatch(argv: Sequence[str]) -> int:
    config, name, notes = parse(argv)
    notes = [ops.prepare_process(), *notes]  # before JAX starts its threads
    _start_jax(config)
    workdir = Path(FLAGS.workdir or Path("runs") / name)
    if FLAGS.mode == "train":
        train = importlib.import_module("flaxcls.train")
        try:
            train.train(config, workdir, train.StopRequest(), notes)
        except train.Interrupted as interrupted:
            print(f"flaxcls: {interrupted}", file=sys.stderr)
            return 128 + interrupted.signal_number
    elif FLAGS.mode == "evaluate":
        report = importlib.import_module("flaxcls.analysis.report")
        report.evaluate_run(config, workdir, notes)
    elif FLAGS.mode == "summary":
        summary = importlib.import_module("flaxcls.analysis.summary")
        experiment = importlib.import_module("flaxcls.experiment")
        print(summary.model_summary(*experiment.untrained_model(config)))
    return 0


def parse(argv: Sequence[str]) -> tuple[ConfigDict, str, list[str]]:
    """Parses flags and resolves the config.

    Returns:
      The resolved config, the default name of the run, and notes for the log.

    Raises:
      InputError: an unknown flag or key, a value of the wrong type, a config that cannot be read.
    """
    arguments, chosen = _with_config(list(argv))
    try:
        positional = FLAGS(arguments)
        config = FLAGS.config
        config = config if isinstance(config, ConfigDict) else ConfigDict(dict(config))
    except InputError:
        raise
    except flags.Error as error:
        raise InputError(_sentence(error)) from error
    except FileNotFoundError as error:
        raise InputError(_missing_config(chosen)) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"--config: {_sentence(error)}") from error
    if len(positional) > 1:
        raise InputError(f"unexpected argument {positional[1]!r}; flags are written --name=value")
    resolved, notes = config_module.resolve(config)
    return resolved, run_name(chosen, resolved), notes


def run_name(chosen: str, config: ConfigDict) -> str:
    """Returns CONFIG-DATASET of `--config=CONFIG:DATASET`."""
    path, _, dataset = chosen.partition(":")
    return f"{Path(path).stem}-{(dataset or config.data.source).replace('/', '-')}"


def _with_config(argv: list[str]) -> tuple[list[str], str]:
    """Puts the path of the config file into the arguments.

    A name without a file in the working directory is one of those that come with flaxcls. Without
    `--config`, the run in `--workdir` gives its own.
    """
    for i, argument in enumerate(argv):
        flag, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and flag == "config":
            if not equals and i + 1 < len(argv):
                value = argv[i + 1]
                del argv[i + 1]
            argv[i] = f"--config={_find(value)}"
            return argv, value
    workdir = _flag_value(argv, "workdir")
    stored = Path(workdir or "") / "config.json"
    if workdir and stored.is_file():
        # Before the keys that override it, which need it.
        path = f"--config={config_module.__file__}:{stored}"
        return [argv[0], path, *argv[1:]], Path(workdir).name
    if workdir and (_flag_value(argv, "mode") or "train") != "train":
        raise InputError(
            f"--workdir: {workdir!r} holds no config.json, so it is no run folder; "
            "give the folder of a run"
        )
    if any(a in ("--help", "-help", "--helpfull", "--helpshort") for a in argv):
        return argv, ""
    raise InputError(
        "--config is missing; give a config file, or one that comes with flaxcls: "
        + ", ".join(shipped_configs())
    )


def _flag_value(argv: Sequence[str], name: str) -> str | None:
    for i, argument in enumerate(argv):
        flag, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and flag == name:
            return value if equals else (argv[i + 1] if i + 1 < len(argv) else None)
    return None


def _find(value: str) -> str:
    path, colon, dataset = value.partition(":")
    if Path(path).is_file():
        return value
    shipped = _shipped_folder() / f"{path.removeprefix('configs/').removesuffix('.py')}.py"
    return f"{shipped}{colon}{dataset}" if shipped.is_file() else value


def _shipped_folder() -> Path:
    return Path(str(importlib.resources.files("flaxcls.configs")))


def shipped_configs() -> list[str]:
    """Returns the names of the config files that come with flaxcls."""
    folder = _shipped_folder()
    return sorted(
        str(path.relative_to(folder).with_suffix(""))
        for path in folder.rglob("*.py")
        if path.name != "__init__.py"
    )


def _missing_config(chosen: str) -> str:
    path = chosen.partition(":")[0]
    return (
        f"--config: no file {path!r}, and none of that name comes with flaxcls "
        f"({', '.join(shipped_configs())}); correct the path"
    )


def _sentence(error: BaseException) -> str:
    """Returns an error's text as one line."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(str(text).split()) or type(error).__name__


def _start_jax(config: ConfigDict) -> None:
    """Sets what must be set before JAX touches a device."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    jax: Any = importlib.import_module("jax")
    logging.getLogger("jax").setLevel(logging.WARNING)
    if config.precision == "float64":
        jax.config.update("jax_enable_x64", True)
    if FLAGS.coordinator is not None:
        if FLAGS.num_processes is None or FLAGS.process_id is None:
            raise InputError(
                "--coordinator needs --num_processes and --process_id too; give all three"
            )
        jax.distributed.initialize(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
    elif int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
        jax.distributed.initialize()
    ops.set_backend(config.ops.backend)


if __name__ == "__main__":
    run()
