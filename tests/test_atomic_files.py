"""Files are whole or as they were, whichever room writes them."""

import errno

import flax.linen as nn
import numpy as np
import pytest
from full_disk import files_no_larger_than

from flaxcls import config, pretrained, runlog
from flaxcls.atomic_files import write_atomically
from flaxcls.errors import InputError

LARGE = {"params": {"kernel": np.ones(2000, np.float32)}}
WRITERS = {
    "write_atomically": lambda path: write_atomically(path, "x" * 1000),
    "runlog": lambda path: runlog.write_bytes(path, bytes(1000)),
    "config": lambda path: config.save(config.default(), path),
    "pretrained": lambda path: pretrained.save(path, nn.Dense(1), LARGE, layout="flaxcls"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_leaves_the_old_file_whole_and_nothing_beside_it(tmp_path, writer):
    path = tmp_path / "file"
    write_atomically(path, "old")
    with files_no_larger_than(100), pytest.raises((OSError, InputError)) as caught:
        WRITERS[writer](path)
    cause = caught.value.__cause__ or caught.value
    assert cause.errno == errno.EFBIG
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    WRITERS[writer](path)
    assert path.stat().st_size > 100
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_written_as_utf_8_and_bytes_as_they_are(tmp_path):
    write_atomically(tmp_path / "text", "Füße")
    assert (tmp_path / "text").read_bytes() == "Füße".encode()
    write_atomically(str(tmp_path / "text"), b"\xff\x00")
    assert (tmp_path / "text").read_bytes() == b"\xff\x00"


def test_what_cannot_take_the_place_of_a_file_is_removed(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path / "folder", "content")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
