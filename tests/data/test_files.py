"""Whole files or none: what a reader sees when a writer fails or is killed."""

import os
import signal
import subprocess
import sys

import pytest

from data.files import replacing, write_atomically


def test_bytes_and_text_replace_what_was_there(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"\x00old")
    write_atomically(path, "süß\n", durable=False)
    assert path.read_bytes() == "süß\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_bytes(b"half")
            assert path.read_bytes() == b"old"
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("file", b"old")]


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = (
        "import os, signal, sys; from pathlib import Path; from data.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, path]).returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    write_atomically(path, b"new")  # what the killed one left is in nobody's way
    assert path.read_bytes() == b"new"


def test_durable_files_are_synced_before_they_take_the_name(tmp_path, monkeypatch):
    path, seen = tmp_path / "file", []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(path.exists()))
    write_atomically(path, b"now", durable=False)
    assert seen == []
    path.unlink()
    write_atomically(path, b"now")
    assert seen == [False, True]  # the bytes before the name, the folder after it
