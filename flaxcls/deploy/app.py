"""`--mode=app`: a page in the browser that shows what runs say of a picture, and teaches them."""

import contextlib
import errno
import glob
import ipaddress
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from flaxcls.deploy.answers import Answers, ServedRun
from flaxcls.deploy.counter import say
from flaxcls.deploy.inputs import shown
from flaxcls.deploy.predictor import Predictor
from flaxcls.deploy.trained import load_run
from flaxcls.deploy.video import Stop
from flaxcls.errors import InputError

MOST_RUNS = 12  # whose models are in memory together


def serve(config: ConfigDict | None, workdir: str, *, host: str, port: int) -> None:
    """Serves the page until Ctrl-C, which is how it ends; prints its address.

    Args:
      config: of the run, resolved, where `workdir` is one; otherwise each run's own is used.
      workdir: a run folder; or several, or patterns, separated by commas, to compare runs.
      host: name or address of this machine to listen at; only 127.0.0.1 is out of others' reach.
      port: 0 is any free one.

    Raises:
      InputError: a library of the extra `app` is missing, a folder holds no trained run, or the
        address cannot be listened at.
    """
    page = _page()
    with _listening(host, port) as listener:
        answers = Answers(load_runs(workdir, config))
        server = page.PageServer(answers, listener, (host, socket.gethostname()))
        with Stop() as stop:
            server.start()
            answers.warm_up()
            for line in _greeting(listener, answers.runs):
                say(line)
            while server.is_running and not stop:
                server.wait(0.2)
        server.stop()
    if answers.is_teaching:
        say("the class that was being taught is given up")
    if server.is_running or answers.is_busy:
        # A thread that is inside JAX would crash while Python ends under it.
        sys.stdout.flush()
        os._exit(0)


def load_runs(workdir: str, config: ConfigDict | None = None) -> list[ServedRun]:
    """Reads the runs that a `--workdir` names; see `serve`.

    Raises:
      InputError: there is none, there are too many, or one of them cannot be read.
    """
    folders = find_folders(workdir)
    if len(folders) > MOST_RUNS:
        raise InputError(
            f"--workdir: '{workdir}' names {len(folders)} runs, of which the page takes {MOST_RUNS}"
            "; name fewer"
        )
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = []
    for folder, name in zip(folders, names, strict=True):
        trained = load_run(folder, config if len(folders) == 1 else None)
        if trained.config.precision == "float64":
            jax.config.update("jax_enable_x64", True)
        runs.append(ServedRun(Predictor(trained, batch_size=1), name))
    return runs


def find_folders(workdir: str) -> list[Path]:
    """Returns the run folders that a `--workdir` names, each once.

    What a pattern matches besides is left out; what is named itself must be there.

    Raises:
      InputError: something of it names no run.
    """
    # A comma may be part of a name.
    whole = os.path.exists(os.path.expanduser(workdir))
    named = [workdir] if whole else [part.strip() for part in workdir.split(",")]
    found: dict[str, Path] = {}
    for given in filter(None, named):
        path = os.path.expanduser(given)
        matches = [path]
        if not os.path.lexists(path):
            matches = sorted(filter(_is_run, glob.glob(path, recursive=True)))
            if not matches:
                raise InputError(
                    f"--workdir: there is no run {shown(given)}; give the folder of a trained run, "
                    "or of several, separated by commas"
                )
        for match in matches:
            found.setdefault(os.path.realpath(match), Path(os.path.abspath(match)))
    if not found:
        raise InputError("--workdir is empty; give the folder of a trained run")
    return list(found.values())


def _is_run(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, "preprocess.json"))


def _page() -> Any:
    """Returns the module that needs the extra `app`."""
    try:
        from flaxcls.deploy import page
    except ModuleNotFoundError as error:
        raise InputError(
            f"--mode=app needs {error.name}, which is not installed; pip install 'flaxcls[app]'"
        ) from error
    return page


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """Gives a socket that listens at an address.

    Raises:
      InputError: it cannot.
    """
    if not 0 <= port < 2**16:
        raise InputError(f"--port: {port} is no port; give one from 1024 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"--host: {host!r} is no name or address of this machine; leave it out for 127.0.0.1"
        ) from error
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(128)
        except OSError as error:
            raise InputError(_not_listening(host, port, error)) from error
        yield listener


def _not_listening(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        other = port + 1 if port < 2**16 - 1 else port - 1
        return (
            f"--port: {port} is in use by another program; stop that, or give another port (such "
            f"as --port={other})"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"--port: {port} is kept for the administrator; give one from 1024 to 65535"
    if error.errno == errno.EADDRNOTAVAIL:
        return (
            f"--host: {host!r} is no address of this machine; leave it out for 127.0.0.1, or give "
            "0.0.0.0 for all it has"
        )
    return f"cannot listen at {host}, port {port}: {error.strerror}; give another --host or --port"


def _greeting(listener: socket.socket, runs: Sequence[ServedRun]) -> list[str]:
    """Returns where the page is, of what, and who can open it."""
    host, port = listener.getsockname()[:2]
    address = ipaddress.ip_address(host.partition("%")[0])
    where = socket.gethostname() if address.is_unspecified else host
    where = f"[{where}]" if ":" in where else where
    names = ", ".join(shown(run.name) for run in runs)
    lines = [f"the page on {names} is at http://{where}:{port}", "Ctrl-C ends it"]
    if not address.is_loopback:
        lines.insert(1, "everybody who reaches this machine can open it and teach its runs")
    return lines
