"""The file with service configs, when it isn't what it should be: it is refused, and nothing waits or grows for it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from mesh.config.sources import ConfigFile
from tests import limited

MEBIBYTE = 1024 * 1024

LOOK = """\
import sys
try:
    print(ConfigFile(sys.argv[1], "any").poll())
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_file_of_60_mb_is_refused_without_being_read(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(b'{"x":[' + b"[]," * (20 * MEBIBYTE) + b"[]]}")
    told, _ = limited.run("from mesh.config.sources import ConfigFile", LOOK, str(file), more=32 * MEBIBYTE, within=10)
    assert told == f"{file}: {60 * MEBIBYTE + 10} bytes; the limit is 1048576\n"


@pytest.mark.slow
def test_a_file_of_the_largest_size_takes_little_memory(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    content = b'{"x":[' + b"[]," * (MEBIBYTE // 3 - 4) + b"[]]}"
    file.write_bytes(content)
    told, _ = limited.run("from mesh.config.sources import ConfigFile", LOOK, str(file), more=192 * MEBIBYTE, within=10)
    assert len(told) > MEBIBYTE // 2, told[:200]


@pytest.mark.slow
def test_a_fifo_is_refused_at_once(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    told, _ = limited.run("from mesh.config.sources import ConfigFile", LOOK, str(fifo), more=32 * MEBIBYTE, within=10)
    assert told == f"{fifo}: not a regular file\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/dev/zero", "not a regular file"),
        ("/dev", "not a regular file"),
        ("/proc/self/mem", "Input/output error"),
    ],
)
def test_what_is_no_file_of_text_is_refused(path: str, why: str) -> None:
    told, _ = limited.run("from mesh.config.sources import ConfigFile", LOOK, path, more=32 * MEBIBYTE, within=10)
    assert told == f"{path}: {why}\n"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'{"services": {"*": {}, "*": {"slowStart": {}}}}', "services.*: duplicate key"),
        (b'{"services": {"*": {"timeout": 1, "timeout": 2}}}', "services.*.timeout: duplicate key"),
        (rb'{"healthCheckConfig": {"serviceName": "\ud800"}}', "healthCheckConfig.serviceName: not valid UTF-8 text"),
        (b'{"x": "\xff"}', "not UTF-8 text: invalid start byte at byte 7"),
        ('{"x": 1}'.encode("utf-16"), "not UTF-8 text: "),
    ],
)
def test_text_that_readers_would_read_differently_is_refused_with_its_path(
    tmp_path: Path, content: bytes, why: str
) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="^" + re.escape(f"{file}: ")) as caught:
        ConfigFile(str(file), "any").poll()
    assert why.replace(".*", '."*"') in str(caught.value)


def test_a_file_that_is_refused_leaves_no_descriptor_open(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(b" " * (MEBIBYTE + 1))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for path in (str(file), "/dev"):
        with pytest.raises(ValueError, match=r"the limit is|not a regular file"):
            ConfigFile(path, "any").poll()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_link_to_a_file_and_a_byte_order_mark_are_fine(tmp_path: Path) -> None:
    file, link = tmp_path / "config.json", tmp_path / "link"
    file.write_text("\ufeff" + json.dumps({"slowStart": None}), "utf-8")
    link.symlink_to(file)
    assert ConfigFile(str(link), "any").poll() == '{"slowStart": null}'
