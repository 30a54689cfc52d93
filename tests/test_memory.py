"""How much memory there is and was."""

import subprocess
import sys

import jax
import pytest

from flaxcls import memory


def test_the_peak_grows_with_what_is_used_and_stays_when_it_is_freed():
    if memory.peak_memory() is None:
        pytest.skip("the system does not say how much memory a process took")
    program = (
        "import numpy as np\n"
        "from flaxcls.memory import _peak_host_bytes\n"
        "before = _peak_host_bytes()\n"
        "np.ones(300_000_000, np.uint8).sum()\n"
        "after = _peak_host_bytes()\n"
        "print(after - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert 290e6 < int(done.stdout) < 400e6


def test_a_device_with_memory_of_its_own_is_asked(monkeypatch):
    class Device:
        def __init__(self, **stats):
            self.stats = stats

        def memory_stats(self):
            return self.stats

    devices = [Device(peak_bytes_in_use=n, bytes_limit=9, bytes_in_use=4) for n in (5, 7)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert memory.peak_memory() == 7
    assert memory.free_memory()[0] == 5


def test_where_the_system_does_not_say_there_is_no_peak(monkeypatch, tmp_path):
    assert memory._kilobytes(str(tmp_path / "absent"), "VmHWM") is None
    (tmp_path / "status").write_text("VmPeak:\t  12 kB\nVmHWM:\t  34 kB\n")
    assert memory._kilobytes(str(tmp_path / "status"), "VmHWM") == 34 * 1024
    assert memory._kilobytes(str(tmp_path / "status"), "VmSwap") is None


def test_free_memory_is_that_of_the_machine():
    device, host = memory.free_memory()
    assert 0 < host < 2**50
    assert 0 < device < 2**50


@pytest.mark.parametrize(
    ("count", "words"), [(3_210_000, "3.2 MB"), (2_345_678_901, "2.3 GB"), (0, "0.0 MB")]
)
def test_sizes_in_words(count, words):
    assert memory.describe_bytes(count) == words
