"""What is compiled once is kept in the user's cache folder, and only there."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from flaxcls.ops import cache, keep_compiled_programs

FOLDER, MOST, SHORTEST = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def settings():
    """JAX's settings of its cache as they are at first, and put back afterwards."""
    before = {name: getattr(jax.config, name) for name in (FOLDER, MOST, SHORTEST)}
    jax.config.update(FOLDER, None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def train(workdir: Path, caches: Path, **environment: str) -> str:
    command = (
        *(sys.executable, "-m", "flaxcls.main", "--config=lenet", f"--workdir={workdir}"),
        *("--config.train.epochs=1", "--config.log.plots=False", "--config.log.tensorboard=False"),
        "--config.ops.backend=xla",  # or each new folder would have the native operators compiled
    )
    done = subprocess.run(
        command,
        env=os.environ | {"XDG_CACHE_HOME": str(caches)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def kept(caches: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in caches.rglob("*-cache")}


def test_the_second_start_compiles_nothing_and_ends_with_the_same_weights(tmp_path):
    caches = tmp_path / "caches"
    train(tmp_path / "first", caches)
    compiled = kept(caches)
    assert any(name.startswith("jit_train_step") for name in compiled)
    (folder,) = (caches / "flaxcls").glob("jax-*")
    assert folder.stat().st_mode & 0o077 == 0  # what is in it is run
    train(tmp_path / "second", caches)
    assert kept(caches) == compiled
    first, second = (tmp_path / name / "weights.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()

    # A damaged entry is compiled anew.
    for entry in caches.rglob("jit_train_step*-cache"):
        entry.write_bytes(entry.read_bytes()[:1000])
    assert "Error reading persistent compilation cache" in train(tmp_path / "third", caches)
    assert (tmp_path / "third" / "weights.safetensors").read_bytes() == first.read_bytes()


def test_the_cache_is_bounded_and_of_this_machine(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_compiled_programs()
    here = Path(jax.config.jax_compilation_cache_dir)
    assert here.parent == tmp_path / "flaxcls"
    assert jax.config.jax_compilation_cache_max_size == 2**30
    monkeypatch.setattr(cache, "_cpu", lambda: "another")
    jax.config.update(FOLDER, None)
    keep_compiled_programs()
    assert Path(jax.config.jax_compilation_cache_dir) != here


def test_a_cache_that_the_user_set_up_stays(settings, tmp_path):
    jax.config.update(FOLDER, str(tmp_path))
    keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)


def test_without_a_folder_nothing_is_kept(settings, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir is None
