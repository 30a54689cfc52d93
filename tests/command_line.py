"""Commands of `python -m flaxcls.main` run in this process, and what they leave in a folder."""

import contextlib
import hashlib
import io
import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from flaxcls.main import main

# A run of lenet on 200 digits: two epochs of eight steps, nothing drawn.
SMALL = (
    "--config=lenet",
    "--config.data.max_per_class=20",
    "--config.train.batch_size=16",
    "--config.train.epochs=2",
    "--config.log.plots=False",
    "--config.log.tensorboard=False",
)


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    output: str
    error: str

    @property
    def sentence(self) -> str:
        """What is wrong: the one line on standard error, of a command that failed."""
        assert self.code == 2, f"exit code {self.code}: {self.error}"
        lines = self.error.splitlines()
        assert len(lines) == 1, self.error
        assert lines[0].startswith("flaxcls: ")
        assert "Traceback" not in self.output
        return lines[0].removeprefix("flaxcls: ")


def run(*arguments: str) -> Done:
    """Runs a command in this process; what libraries print, in any language, counts too."""
    output, error = io.StringIO(), io.StringIO()
    # Libraries' loggers write to the stream that was there when they were made.
    log = logging.StreamHandler(error)
    logging.getLogger().addHandler(log)
    try:
        with (
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(error),
            _descriptor() as file,
        ):
            code = main(["flaxcls", *arguments])
    finally:
        logging.getLogger().removeHandler(log)
    return Done(code, output.getvalue(), error.getvalue() + file.getvalue().decode())


@contextlib.contextmanager
def _descriptor() -> Iterator[io.BytesIO]:
    """Collects what is written to file descriptor 2."""
    collected, kept = io.BytesIO(), os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield collected
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            collected.write(file.read())


def contents(folder: Path) -> dict[str, str]:
    """A hash of every file under a folder, by its path, without the lock."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@contextlib.contextmanager
def compiled_once(folder: Path) -> Iterator[None]:
    """Compiles fast, and keeps programs in a folder, so that runs of the same kind share them."""
    wanted = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in wanted}
    try:
        _configure(wanted)
        yield
    finally:
        _configure(before)


def _configure(values: dict[str, object]) -> None:
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
