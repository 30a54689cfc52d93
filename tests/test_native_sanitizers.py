"""The native operators run clean under the address and the undefined-behaviour sanitizer."""

import subprocess
from pathlib import Path

import pytest

from flaxcls.ops.native import build

DRIVERS = Path(__file__).parent / "native_drivers"
FLAGS = (
    *("-std=c++17", "-O1", "-g1", "-pthread", f"-I{build.SOURCES}", "-DFLAXCLS_NO_MASKS"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
)
# Four floats, of which it loads as many as there are arguments, itself among them.
PROBE = """
#include "vectors.h"
int main(int n, char**) {
  float* four = new float[4]();
  const auto loaded = flaxcls::Load(four, flaxcls::FirstLanes{n});
  delete[] four;
  return loaded[0] != 0;
}
"""


def run(*command):
    """Returns the exit code and what was printed; no test may wait forever."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def compile_with_sanitizers(tmp_path_factory):
    """Compiles a file and returns the program, where programs with sanitizers run at all."""
    compiler = build._compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("sanitizers")

    def compile_(source):
        program = str(folder / source.stem)
        command = (*compiler, *FLAGS, build._machine_flag(), str(source), "-o", program)
        code, said = run(*command)
        return program, code, said

    empty = folder / "empty.cc"
    empty.write_text("int main() {}\n")
    program, code, said = compile_(empty)
    if code == 0:
        code, said = run(program)
    if code != 0:
        pytest.skip(f"no sanitizers with {compiler[0]} here: {(said.splitlines() or [''])[0]}")

    def compile_or_fail(source):
        program, code, said = compile_(source)
        assert code == 0, said
        return program

    return compile_or_fail


def test_a_load_of_one_number_too_many_is_found(compile_with_sanitizers, tmp_path):
    """Otherwise that nothing is found would mean nothing."""
    source = tmp_path / "probe.cc"
    source.write_text(PROBE)
    program = compile_with_sanitizers(source)
    assert run(program, *"123") == (0, "")  # four numbers
    code, said = run(program, *"1234")
    assert code != 0
    assert "heap-buffer-overflow" in said


@pytest.mark.parametrize("operator", ["convolution", "batchnorm", "pooling"])
def test_random_shapes_are_right_and_nothing_is_found(compile_with_sanitizers, operator):
    code, said = run(compile_with_sanitizers(DRIVERS / f"{operator}.cc"))
    assert code == 0, said
    assert said.endswith(" shapes, 0 wrong\n")
