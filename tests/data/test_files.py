"""Whole files or none: what a reader sees when a writer fails or is killed."""

import os
import signal
import subprocess
import sys

import pytest

from data.files import own_folder, replacing, write_atomically


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


def test_a_folder_that_others_could_have_filled_is_refused(tmp_path):
    made = own_folder(tmp_path / "new" / "mine", "features.folder")
    assert made.stat().st_mode & 0o777 == 0o700
    assert own_folder(made, "features.folder") == made
    made.chmod(0o770)
    with pytest.raises(PermissionError, match=r"others may write into it: remove it, or set features\.folder"):
        own_folder(made, "features.folder")
    made.chmod(0o700)
    os.symlink(made, tmp_path / "link")
    with pytest.raises(PermissionError):
        own_folder(tmp_path / "link", "features.folder")
    if os.geteuid() == 0:
        os.chown(made, 65534, 65534)
        with pytest.raises(PermissionError, match="another user"):
            own_folder(made, "features.folder")
