"""flaxcls trains, evaluates and measures image classifiers.

python -m flaxcls.main --config=configs/vgg13.py
python -m flaxcls.main --mode=evaluate --workdir=runs/vgg13-digits
python -m flaxcls.main --mode=compare --workdir='runs/*'
"""

from flaxcls import interrupt

if __name__ == "__main__":
    interrupt.listen()  # before JAX is imported, which takes seconds

import argparse
import dataclasses
import importlib
import importlib.resources
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from flaxcls import __version__, ops
from flaxcls import config as config_module
from flaxcls.errors import InputError, did_you_mean

# Modes that need a run, not a config.
ON_RUNS = ("evaluate", "predict", "export", "app", "add_class")
ON_MANY_RUNS = ("compare", "app")  # modes that take several runs, and then no config
# Flags that belong to some modes, and what they are for.
OF_MODES = {
    "input": ("predict", "add_class"),
    "output": ("predict", "export", "add_class", "check_data"),
    "top_k": ("predict",),
    "explain": ("predict",),
    "invert": ("predict", "add_class"),
    "class_name": ("add_class",),
    "parent": ("add_class",),
    "method": ("add_class",),
    "host": ("app",),
    "port": ("app",),
}
KEY = r"--?(?:no)?config\.([^=]+)"  # an argument that sets a key of the config


@dataclasses.dataclass(frozen=True)
class Command:
    """A command line that was understood.

    Attributes:
      flags: as given: mode, coordinator, num_processes, process_id.
      config: resolved; the defaults where several runs have their own.
      workdir: the run folder; a pattern of several runs.
      notes: sentences for the log.
    """

    flags: argparse.Namespace
    config: ConfigDict
    workdir: Path
    notes: list[str]


def run() -> None:
    """Runs the command of `sys.argv` and exits."""
    interrupt.listen()
    sys.exit(main(sys.argv))


def main(argv: Sequence[str]) -> int:
    """Runs one command and returns its exit code.

    0: done. 2: the input is wrong, in one sentence on standard error. 128 + n: stopped by signal
    n, saved, to be resumed.
    """
    try:
        command = parse(argv)
        return MODES[command.flags.mode](command)
    except InputError as error:
        if "--debug" in argv:
            raise
        print(f"flaxcls: {error}", file=sys.stderr)
        _end_with_the_others()
        return 2
    except KeyboardInterrupt:  # only where `interrupt` does not listen: called as a function
        print(f"flaxcls: {interrupt.SENTENCE}", file=sys.stderr)
        return 130


def _train(command: Command) -> int:
    memory = _start(command)
    train = importlib.import_module("flaxcls.train")
    try:
        train.train(command.config, command.workdir, train.StopRequest(), command.notes, memory)
    except train.Interrupted as interrupted:
        print(f"flaxcls: {interrupted}", file=sys.stderr)
        return 128 + interrupted.signal_number
    return 0


def _evaluate(command: Command) -> int:
    _start(command)
    report = importlib.import_module("flaxcls.analysis.report")
    report.evaluate_run(command.config, command.workdir, command.notes)
    return 0


def _summary(command: Command) -> int:
    _start(command)
    summary = importlib.import_module("flaxcls.analysis.summary")
    experiment = importlib.import_module("flaxcls.experiment")
    print(summary.model_summary(*experiment.untrained_model(command.config)))
    return 0


def _compare(command: Command) -> int:
    compare = importlib.import_module("flaxcls.analysis.compare")
    compare.compare_runs(command.flags.workdir)
    return 0


def _check_data(command: Command) -> int:
    check_data = importlib.import_module("flaxcls.analysis.check_data")
    folder = Path(command.flags.output) if command.flags.output else command.workdir
    return check_data.check_data(command.config, folder)


def _predict(command: Command) -> int:
    _start(command)
    predict = importlib.import_module("flaxcls.deploy.predict")
    given = command.flags
    predict.predict_run(
        command.config,
        command.workdir,
        given.input or [],
        output=given.output,
        top_k=5 if given.top_k is None else given.top_k,
        explain=given.explain,
        invert=given.invert or "auto",
    )
    return 0


def _export(command: Command) -> int:
    _start(command)
    export = importlib.import_module("flaxcls.deploy.export")
    export.export_run(command.config, command.workdir, command.flags.output)
    return 0


def _add_class(command: Command) -> int:
    _start(command)
    add_class = importlib.import_module("flaxcls.deploy.add_class")
    given = command.flags
    add_class.add_class_to_run(
        command.config,
        command.workdir,
        given.input or [],
        name=given.class_name,
        parent=given.parent,
        method=given.method or "imprint",
        output=given.output,
        invert=given.invert or "auto",
    )
    return 0


def _app(command: Command) -> int:
    _start(command)
    app = importlib.import_module("flaxcls.deploy.app")
    given = command.flags
    app.serve(
        command.config if _is_run(given) else None,
        given.workdir,
        host=given.host or "127.0.0.1",
        port=7860 if given.port is None else given.port,
    )
    return 0


MODES: dict[str, Callable[[Command], int]] = {
    "train": _train,
    "evaluate": _evaluate,
    "summary": _summary,
    "compare": _compare,
    "check_data": _check_data,
    "predict": _predict,
    "export": _export,
    "add_class": _add_class,
    "app": _app,
}


def _end_with_the_others() -> None:
    """Ends one of several processes at once: the others wait for it, and JAX ends them then."""
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1:
        sys.stderr.flush()
        os._exit(2)


def parse(argv: Sequence[str]) -> Command:
    """Reads the command line and the config that it names.

    Raises:
      InputError: an unknown flag or key, a value of the wrong type, a config that cannot be read.
    """
    for argument in argv:
        if "\0" in argument:
            flag = argument.partition("=")[0]
            raise InputError(f"{flag}: {argument!r} holds a NUL character; remove it")
    parser = _parser()
    given, keys = parser.parse_known_args(argv[1:])
    if given.mode not in MODES:
        raise InputError(f"--mode: unknown mode {given.mode!r}; {did_you_mean(given.mode, MODES)}")
    _check_flags(keys, known=list(vars(given)))
    _check_mode(given)
    takes_config = given.mode not in ON_MANY_RUNS or (given.mode == "app" and _is_run(given))
    if not takes_config:
        _refuse_config(given, keys)
        return Command(given, config_module.default(), Path(given.workdir), [])
    config = _read_config(given)
    _override(config, keys)
    resolved, notes = config_module.resolve(config)
    workdir = given.workdir or Path("runs", run_name(given.config, resolved))
    return Command(given, resolved, Path(workdir), notes)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; flags are written --name=value, and --help lists them")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m flaxcls.main",
        description=__doc__,
        epilog=f"Configs that come with flaxcls: {', '.join(shipped_configs())}. "
        f"Every key of a config and its default: {config_module.keys.__file__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        type=os.path.expanduser,
        metavar="FILE[:DATASET]",
        help="config file, or the name of one that comes with flaxcls; --config.GROUP.KEY=VALUE "
        "overrides a key",
    )
    parser.add_argument("--mode", default="train", help=f"one of {', '.join(MODES)}")
    parser.add_argument(
        "--workdir",
        type=os.path.expanduser,
        metavar="DIR",
        help="run folder; by default runs/CONFIG-DATASET. With compare and app also a quoted "
        "pattern, or several separated by commas",
    )
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT", help="first of several processes, given to each"
    )
    parser.add_argument("--num_processes", type=int, metavar="N", help="how many processes")
    parser.add_argument("--process_id", type=int, metavar="I", help="which of them, from 0")
    parser.add_argument(
        "--input",
        action="append",
        type=os.path.expanduser,
        metavar="FILE",
        help="predict: image, folder, pattern, video, or the number of a camera; add_class: "
        "example photos, or a folder of them; may be given several times",
    )
    parser.add_argument(
        "--output",
        type=os.path.expanduser,
        metavar="DIR",
        help="where what the mode makes goes; by default into the run folder, with add_class "
        "beside it",
    )
    parser.add_argument(
        "--top_k", type=int, metavar="K", help="predict: classes shown; by default 5"
    )
    parser.add_argument(
        "--explain",
        nargs="?",
        const="auto",
        metavar="METHOD",
        help="predict: draw what decided, by cam, grad_cam, grad_cam_pp, attention or occlusion; "
        "without a method by the best that the model has",
    )
    parser.add_argument(
        "--invert",
        nargs="?",
        const="yes",
        metavar="yes|no|auto",
        help="predict, add_class: swap light and dark, for a model of light objects on dark "
        "ground; by default (auto) where the run's intensities say so",
    )
    parser.add_argument("--class_name", metavar="NAME", help="add_class: the new class")
    parser.add_argument(
        "--parent", metavar="NAME", help="add_class: its parent, of a model that has them"
    )
    parser.add_argument(
        "--method",
        metavar="imprint|finetune",
        help="add_class: how the head learns; by default imprint",
    )
    parser.add_argument("--host", help="app: address to listen at; by default 127.0.0.1")
    parser.add_argument("--port", type=int, help="app: by default 7860")
    parser.add_argument("--version", action="version", version=f"flaxcls {__version__}")
    parser.add_argument(
        "--debug", action="store_true", help="show the traceback of an error in the input"
    )
    return parser


def _read_config(given: argparse.Namespace) -> ConfigDict:
    """Returns the config that `--config` names, without it the one of the run in `--workdir`."""
    if given.config is not None:
        path, colon, dataset = _find(given.config).partition(":")
        if not Path(path).is_file():
            raise InputError(_missing_config(path))
        return config_module.from_file(Path(path), *([dataset] if colon else []))
    if _is_run(given):
        return config_module.load(Path(given.workdir, "config.json"))
    if given.mode not in ON_RUNS:
        raise InputError(
            "--config is missing; give a config file, or one that comes with flaxcls: "
            + ", ".join(shipped_configs())
        )
    if not given.workdir:
        raise InputError("--workdir is missing; give the folder of a run")
    raise InputError(
        f"--workdir: '{given.workdir}' holds no config.json, so it is no run folder; "
        "give the folder of a run"
    )


def _is_run(given: argparse.Namespace) -> bool:
    """Whether `--workdir` is the folder of one run."""
    return bool(given.workdir) and Path(given.workdir, "config.json").is_file()


def _check_flags(arguments: list[str], known: list[str]) -> None:
    """Refuses what is neither a flag nor a key of the config."""
    for argument in arguments:
        flag = re.match(r"--?([^=]+)", argument)
        key = re.match(KEY, argument)
        if key:
            config_module.check_key(key[1])
        elif flag:
            raise InputError(f"--{flag[1]}: there is no such flag; {did_you_mean(flag[1], known)}")


def _check_mode(given: argparse.Namespace) -> None:
    """Refuses a flag that the mode does not take."""
    for flag, modes in OF_MODES.items():
        if getattr(given, flag) is not None and given.mode not in modes:
            raise InputError(
                f"--{flag}: --mode={given.mode} takes no such flag; leave it out, or give "
                f"{' or '.join(f'--mode={mode}' for mode in modes)}"
            )


def _refuse_config(given: argparse.Namespace, arguments: list[str]) -> None:
    """Refuses a config and its keys for a mode on many runs, and a command that names no run."""
    keys = [key[1] for key in (re.match(KEY, argument) for argument in arguments) if key]
    if given.config is not None or keys:
        named = f"--config.{keys[0]}" if keys else "--config"
        raise InputError(
            f"{named}: --mode={given.mode} takes the configs that the runs hold; leave it out"
        )
    if arguments:
        raise InputError(
            f"unexpected argument {arguments[0]!r}; put the pattern in quotes, as in "
            "--workdir='runs/*'"
        )
    if not given.workdir:
        raise InputError("--workdir is missing; give the folders of runs, as in --workdir='runs/*'")


def _override(config: ConfigDict, arguments: list[str]) -> None:
    """Sets the keys of `--config.GROUP.KEY=VALUE` arguments."""
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    argv = ["flaxcls", *arguments]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        unexpected = values(argv)[1:]
    except (flags.Error, ValueError, TypeError) as error:
        illegal = re.match(r"flag --config\.(\S+?)=(.*?): ", str(error), re.DOTALL)
        if not illegal:
            raise InputError(f"{error}; keys are written --config.GROUP.KEY=VALUE") from error
        path, value = illegal.groups()
        kind = config_module.KINDS[config_module.key_types()[path]]
        if config_module.ELEMENTS.get(path) is str:
            kind = "a tuple of texts; give the flag once for each, or all as ('a', 'b') in quotes"
        raise InputError(f"--config.{path}: {value!r} is not {kind}") from error
    if unexpected:
        raise InputError(f"unexpected argument {unexpected[0]!r}; flags are written --name=value")


def run_name(chosen: str, config: ConfigDict) -> str:
    """Returns CONFIG-DATASET of `--config=CONFIG:DATASET`."""
    path, _, dataset = chosen.partition(":")
    name = _shipped_name(path)
    stem = name.replace("/", "-") if name in shipped_configs() else Path(path).stem
    return f"{stem}-{(dataset or config.data.source).replace('/', '-')}"


def _find(value: str) -> str:
    path, colon, dataset = value.partition(":")
    if Path(path).is_file():
        return value
    shipped = _shipped_folder() / f"{_shipped_name(path)}.py"
    return f"{shipped}{colon}{dataset}" if shipped.is_file() else value


def _shipped_name(path: str) -> str:
    """configs/fashion/vgg16.py -> fashion/vgg16."""
    return path.removeprefix("./").removeprefix("configs/").removesuffix(".py")


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


def _missing_config(path: str) -> str:
    if Path(path).is_dir():
        return f"--config: {path!r} is a folder; give a config file"
    remedy = did_you_mean(_shipped_name(path), shipped_configs())
    return f"--config: no file {path!r}, and no config of that name comes with flaxcls; {remedy}"


def _start(command: Command) -> str:
    """Sets the process up and starts JAX; returns what became of the allocator, for the log."""
    memory = ops.prepare_process()  # before JAX starts its threads
    _start_jax(command.config, command.flags)
    if command.flags.mode in ("train", "evaluate"):
        if ops.native_is_pending():
            print("compiling the native operators, once for this machine", flush=True)
        # While the data are read.
        threading.Thread(target=ops.native_status, daemon=True).start()
    return memory


def _start_jax(config: ConfigDict, given: argparse.Namespace) -> None:
    """Sets what must be set before JAX touches a device."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    jax: Any = importlib.import_module("jax")
    logging.getLogger("jax").setLevel(logging.WARNING)
    if config.precision == "float64":
        jax.config.update("jax_enable_x64", True)
    ops.keep_compiled_programs()
    _join_processes(jax, given)
    ops.set_backend(config.ops.backend)
    ops.set_precision(config.ops.precision)


def _join_processes(jax: Any, given: argparse.Namespace) -> None:
    """Connects this process with the others of its run, where flags or SLURM say there are any."""
    arguments: tuple[Any, ...] = (given.coordinator, given.num_processes, given.process_id)
    if arguments != (None, None, None):
        _check_process_flags(given)
        remedy = f"see that process 0 runs at {given.coordinator}"
    elif "SLURM_PROCID" in os.environ and _slurm_tasks() > 1:
        arguments = ()  # JAX reads them from SLURM's variables
        remedy = "start the command with srun, or unset SLURM_NTASKS to run it alone"
    else:
        return
    try:
        jax.distributed.initialize(*arguments)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"the processes cannot be connected ({reason}); {remedy}") from error


def _check_process_flags(given: argparse.Namespace) -> None:
    if None in (given.coordinator, given.num_processes, given.process_id):
        raise InputError(
            "--coordinator, --num_processes and --process_id belong together; give all three"
        )
    _, _, port = given.coordinator.rpartition(":")
    if not re.fullmatch(r".+:\d{1,5}", given.coordinator) or not 0 < int(port) < 2**16:
        raise InputError(
            f"--coordinator: {given.coordinator!r} is not HOST:PORT; give the host of process 0 "
            "and a free port of it, such as localhost:1234"
        )
    if not 0 <= given.process_id < given.num_processes:
        raise InputError(
            f"--process_id: {given.process_id} is not one of the {given.num_processes} processes; "
            "number them from 0 to --num_processes - 1"
        )


def _slurm_tasks() -> int:
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if not tasks.isdecimal():
        raise InputError(f"SLURM_NTASKS: {tasks!r} is not a number; unset it or start with srun")
    return int(tasks)


if __name__ == "__main__":
    run()
