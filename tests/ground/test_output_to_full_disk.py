"""What a run prints never ends it."""

import errno
import io
import os
import sys

import pytest

from mocov3_hf.reporting import ToFullDisk, output_to_full_disk


class Disk(io.StringIO):
    """A file on a disk that can be full."""

    error = None

    def write(self, text):
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))
        return super().write(text)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("buffering", [1, -1])
def test_output_to_a_full_disk_is_left_out(monkeypatch, buffering):
    with open("/dev/full", "w", buffering=buffering) as full:
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(sys, "stderr", full)
        with output_to_full_disk(is_command=True):
            for _ in range(1000):
                print("some words")
                print("some words", file=sys.stderr)
        monkeypatch.undo()
        assert os.readlink(f"/proc/self/fd/{full.fileno()}") == os.devnull  # the exit code stays


def test_the_gap_is_marked():
    disk = Disk()
    stream = ToFullDisk(disk)
    stream.write("first\n")
    disk.error = errno.ENOSPC
    stream.write("second\n")
    stream.write("third\n")
    disk.error = None
    stream.write("fourth\n")
    assert disk.getvalue() == "first\n\n[output is missing here: the disk was full]\nfourth\n"
    assert stream.isatty() is False


def test_other_errors_are_raised():
    disk = Disk()
    disk.error = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        ToFullDisk(disk).write("words")
