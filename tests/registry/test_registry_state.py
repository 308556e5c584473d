"""What a registry keeps across its restarts: service configs, in the folder that MESH_REGISTRY_STATE names."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from mesh import files
from mesh.registry.state import State
from tests.processes import Process, Spawn
from tests.registry.serving import BOUND, USER, instance, serving
from weft.mesh.v1 import registry_pb2 as pb
from weft.mesh.v1 import registry_pb2_grpc as pb_grpc

FILE = "configs.json"
CONFIG = '{"loadBalancingConfig": [{"round_robin": {}}]}'
OTHER = '{"loadBalancingConfig": [{"least_request": {}}]}'


def kept(folder: Path) -> dict[str, str]:
    state = State(folder)
    try:
        return state.load()
    finally:
        state.close()


def modes(folder: Path) -> dict[str, str]:
    return {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in (folder, *folder.iterdir())}


# -- the file


def test_what_was_saved_last_is_what_the_next_registry_begins_with(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "state"
    state = State(folder)
    assert state.load() == {}
    state.save({USER: CONFIG})
    state.save({USER: OTHER, "a.B": CONFIG})
    state.close()
    assert kept(folder) == {USER: OTHER, "a.B": CONFIG}
    assert modes(folder) == {"state": "0o700", FILE: "0o600", "lock": "0o600"}
    assert repr(state) == f"<State {folder / FILE}>"


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b'{"version": 1, "configs": {"weft.user.v1.UserService"',
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"configs": []}',
        b"[" * 100_000,
    ],
)
def test_a_corrupt_file_is_set_aside_and_named(text: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FILE).write_bytes(text)
    assert kept(tmp_path) == {}
    (aside,) = tmp_path.glob(f"{FILE}.corrupt-*")
    assert aside.read_bytes() == text
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert str(aside) in record.message
    assert "starting without service configs" in record.message
    # And the next ones are kept beside it.
    state = State(tmp_path)
    state.save({USER: CONFIG})
    state.close()
    assert kept(tmp_path) == {USER: CONFIG}
    (tmp_path / FILE).write_bytes(b"again")
    assert kept(tmp_path) == {}
    assert sorted(path.name for path in tmp_path.glob("*corrupt*")) == [f"{FILE}.corrupt-1", f"{FILE}.corrupt-2"]
    assert aside.read_bytes() == text


@pytest.mark.parametrize(
    ("service", "config", "why"),
    [
        ("", "{}", "it names no service"),
        ("a.B", 3, "it is not a string"),
        ("a.B", '{"methodConfig": 3}', "service config: methodConfig: expected a list, got 3"),
        ("a.B", '{"methodConfig": [{"name": [{}], "timeout": "-1s"}]}', "service config: methodConfig[0].timeout: "),
    ],
)
def test_a_config_that_is_not_valid_any_more_is_named_and_the_others_hold(
    service: str, config: object, why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = json.dumps({"configs": {USER: CONFIG, service: config}})
    (tmp_path / FILE).write_text(text)
    assert kept(tmp_path) == {USER: CONFIG}
    (aside,) = tmp_path.glob(f"{FILE}.corrupt-*")
    assert aside.read_text() == text
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert f"the config of {service!r}: {why}" in record.message
    assert str(aside) in record.message
    assert kept(tmp_path) == {USER: CONFIG}
    assert len(caplog.records) == 1


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    files.replace(tmp_path / "file", b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            files.replace(tmp_path / "file", b"new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_the_data_is_on_disk_before_its_name_and_the_name_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noting_fsync(number: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(number).st_mode) else "file")
        fsync(number)

    def noting_replace(path: Path, target: Path) -> Path:
        done.append("rename")
        return replace(path, target)

    monkeypatch.setattr("os.fsync", noting_fsync)
    monkeypatch.setattr(Path, "replace", noting_replace)
    files.replace(tmp_path / "file", b"new")
    assert done == ["file", "rename", "folder"]


def test_a_folder_is_for_one_registry(tmp_path: Path) -> None:
    state = State(tmp_path)
    with pytest.raises(files.InUseError, match=r"is in use by another process \(pid \d+\)"):
        State(tmp_path)
    state.close()
    State(tmp_path).close()


def test_a_folder_or_file_that_others_may_write_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(files.RefusedError, match=r"writable by everybody \(mode 0777\); run chmod o-w on it"):
        State(folder)
    folder.chmod(0o700)
    state = State(folder)
    state.save({})
    (folder / FILE).chmod(0o666)
    with pytest.raises(files.RefusedError, match=r"writable by everybody \(mode 0666\)"):
        state.load()
    state.close()


# -- the service


async def test_a_config_that_cannot_be_kept_is_refused_and_the_one_before_holds(tmp_path: Path) -> None:
    async with serving() as registry:
        registry.service.state = State(tmp_path / "state")
        await registry.stub.SetServiceConfig(
            pb.SetServiceConfigRequest(service=USER, service_config=CONFIG), timeout=BOUND
        )
        (tmp_path / "state").rename(tmp_path / "gone")
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await registry.stub.SetServiceConfig(
                pb.SetServiceConfigRequest(service=USER, service_config=OTHER), timeout=BOUND
            )
        assert raised.value.code() is grpc.StatusCode.INTERNAL
        assert raised.value.details() == (
            "the registry can't save the config (No such file or directory); keeping the previous one"
        )
        assert registry.book.config(USER) == CONFIG
        registry.service.state.close()


async def test_configs_set_at_once_are_all_kept(tmp_path: Path) -> None:
    async with serving() as registry:
        state = registry.service.state = State(tmp_path)
        names = [f"a.S{number}" for number in range(16)]
        await asyncio.gather(
            *(
                registry.stub.SetServiceConfig(
                    pb.SetServiceConfigRequest(service=name, service_config=CONFIG), timeout=BOUND
                )
                for name in names
            )
        )
        await registry.stub.SetServiceConfig(pb.SetServiceConfigRequest(service=names[0]), timeout=BOUND)
        state.close()
        assert kept(tmp_path) == dict.fromkeys(names[1:], CONFIG), "one that was taken back isn't"


# -- the process


def started(spawn: Spawn, address: str, folder: Path | None) -> Process:
    environment = {"MESH_REGISTRY_STATE": str(folder)} if folder else {}
    registry = spawn.python("-m", "mesh.registry", "--listen", address, environment=environment)
    registry.wait_for("serving on")
    return registry


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_configs_outlast_a_restart_however_it_ended(
    spawn: Spawn, free_port: Callable[[], int], tmp_path: Path, number: signal.Signals
) -> None:
    address, folder = f"127.0.0.1:{free_port()}", tmp_path / "state"
    registry = started(spawn, address, folder)
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.RegistryStub(channel)
        stub.Register(pb.RegisterRequest(instance=instance("a")), timeout=BOUND)
        stub.SetServiceConfig(pb.SetServiceConfigRequest(service=USER, service_config=CONFIG), timeout=BOUND)
        registry.end(number)
        registry = started(spawn, address, folder)
        assert f"service configs are kept in {folder}; 1 restored" in registry.said
        answer = stub.GetServiceConfig(pb.GetServiceConfigRequest(service=USER), timeout=BOUND, wait_for_ready=True)
        assert answer.service_config == CONFIG
        # A watcher gets it with the first answer, though no instance has registered yet.
        snapshot = next(stub.Watch(pb.WatchRequest(service=USER), timeout=BOUND)).snapshot
        assert (list(snapshot.instances), snapshot.service_config) == ([], CONFIG)
    assert registry.end() == 0


@pytest.mark.slow
def test_without_the_variable_there_is_no_file_and_one_line(
    spawn: Spawn, free_port: Callable[[], int], tmp_path: Path
) -> None:
    registry = started(spawn, f"127.0.0.1:{free_port()}", None)
    assert registry.said.count("MESH_REGISTRY_STATE") == 1
    assert "INFO service configs are kept in memory only: set MESH_REGISTRY_STATE=DIR" in registry.said
    assert registry.end() == 0


@pytest.mark.slow
def test_a_folder_that_cannot_be_used_is_one_line_and_exit_code_2(
    spawn: Spawn, free_port: Callable[[], int], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    registry = spawn.python(
        "-m", "mesh.registry", "--listen", f"127.0.0.1:{free_port()}", "--state", tmp_path / "file" / "state"
    )
    assert registry.wait() == 2
    assert registry.said.endswith(
        f"mesh.registry: cannot use {tmp_path}/file/state (MESH_REGISTRY_STATE or --state): Not a directory\n"
    )
    assert "Traceback" not in registry.said

    first = started(spawn, f"127.0.0.1:{free_port()}", tmp_path / "state")
    second = spawn.python("-m", "mesh.registry", "--listen", f"127.0.0.1:{free_port()}", "--state", tmp_path / "state")
    assert second.wait() == 2
    assert f"{tmp_path}/state is in use by another process (pid {first.pid})" in second.said
    assert "Traceback" not in second.said


@pytest.mark.slow
def test_a_corrupt_file_does_not_keep_a_registry_from_starting(
    spawn: Spawn, free_port: Callable[[], int], tmp_path: Path
) -> None:
    (tmp_path / FILE).write_text(json.dumps({"configs": {USER: "not JSON"}}))
    registry = started(spawn, f"127.0.0.1:{free_port()}", tmp_path)
    assert "ERROR" in registry.said
    assert registry.end() == 0
