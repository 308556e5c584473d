"""The disk cache, when its file isn't the one that this user's own client wrote: it is refused, with one warning."""

from __future__ import annotations

import logging
import os
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from mesh.discovery.cache import Cache
from tests import limited
from weft.mesh.v1 import registry_pb2 as pb

REGISTRY, SERVICE = "127.0.0.1:50050", "test.Cached"
KNOWN = pb.Snapshot(instances=[pb.Instance(service=SERVICE, id="a", address="a:1")])
MEBIBYTE = 1024 * 1024

LOAD = f"""\
import logging, sys, pathlib
logging.basicConfig(format="%(message)s")
print(Cache(pathlib.Path(sys.argv[1]), "{REGISTRY}", "{SERVICE}").read())
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    cache(folder).write(KNOWN)
    return folder


def cache(folder: Path) -> Cache:
    return Cache(folder, REGISTRY, SERVICE)


def saved(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def refused(folder: Path, caplog: pytest.LogCaptureFixture) -> str:
    """The one warning, though the cache is asked and written again and again."""
    asked = cache(folder)
    for _ in range(3):
        assert asked.read() is None
    (warning,) = warnings(caplog)
    return warning


def test_the_folder_and_the_file_are_for_this_user_alone(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert folder.stat().st_mode & 0o777 == 0o700
    assert saved(folder).stat().st_mode & 0o777 == 0o600
    assert cache(folder).read() == KNOWN
    assert warnings(caplog) == [f"{saved(folder)}: using 1 cached instances, saved 0 s ago"]


@pytest.mark.slow
def test_a_fifo_is_refused_at_once(folder: Path) -> None:
    file = saved(folder)
    file.unlink()
    os.mkfifo(file)
    told, _ = limited.run("from mesh.discovery.cache import Cache", LOAD, str(folder), more=32 * MEBIBYTE, within=10)
    assert told == f"{file} can't be read: not a regular file\nNone\n"


@pytest.mark.slow
def test_a_file_of_600_mb_is_refused_without_being_read(folder: Path) -> None:
    file = saved(folder)
    os.truncate(file, 600 * MEBIBYTE)
    told, _ = limited.run("from mesh.discovery.cache import Cache", LOAD, str(folder), more=32 * MEBIBYTE, within=10)
    assert told == f"{file} can't be read: {600 * MEBIBYTE} bytes; the limit is 16777216\nNone\n"


def test_another_users_file_is_refused(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    become_another(saved(folder), folder, monkeypatch)
    assert "can't be read: owned by user " in refused(folder, caplog)


def test_another_users_folder_is_refused_for_reading_and_writing(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved(folder).stat()
    become_another(folder, folder, monkeypatch)
    assert "can't be read: owned by user " in refused(folder, caplog)
    cache(folder).write(KNOWN)
    assert saved(folder).stat().st_ino == before.st_ino
    assert "can't be written: owned by user " in warnings(caplog)[-1]


def become_another(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have ``path`` owned by another user than this one."""
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:
        me = os.geteuid()
        monkeypatch.setattr("os.geteuid", lambda: me + 1)


def test_a_folder_that_everybody_may_write_is_refused_for_reading_and_writing(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = saved(folder).stat()
    folder.chmod(0o1777)
    assert refused(folder, caplog).endswith("can't be read: writable by everybody (mode 1777); run chmod o-w on it")
    cache(folder).write(KNOWN)
    assert saved(folder).stat().st_ino == before.st_ino
    assert "can't be written: writable by everybody" in warnings(caplog)[-1]


def test_a_file_that_everybody_may_write_is_refused(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(folder).chmod(0o666)
    assert "can't be read: writable by everybody (mode 0666)" in refused(folder, caplog)


def test_a_file_of_2096_is_refused(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    then = datetime(2096, 1, 1, tzinfo=UTC).timestamp()
    os.utime(saved(folder), (then, then))
    warning = refused(folder, caplog)
    assert "can't be read: dated " in warning
    assert " s in the future; check the clock" in warning
    assert "-" not in warning.partition("dated")[2]


def test_a_clock_that_is_a_little_late_makes_no_age_negative(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    then = time.time() + 30
    os.utime(saved(folder), (then, then))
    assert cache(folder).read() == KNOWN
    assert warnings(caplog)[0].endswith("saved 0 s ago")


def test_what_would_be_refused_is_not_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    huge = pb.Snapshot(service_config="x" * 16 * MEBIBYTE)
    asked = cache(tmp_path / "cache")
    for _ in range(3):
        asked.write(huge)
    (warning,) = warnings(caplog)
    assert "bytes; the limit is 16777216" in warning
    assert not (tmp_path / "cache").exists()
