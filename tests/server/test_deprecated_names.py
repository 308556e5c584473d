"""Names of earlier releases still work, and their warnings say what to use."""

import importlib
from typing import Any

import pytest

import mesh.server.aio
import mesh.server.sync
from mesh.server.handlers.admission import AioServerAdmission, ThreadServerAdmission
from mesh.server.handlers.interceptors import AioServerInterceptor, ServerInterceptor
from mesh.server.settings import ServerSettings


@pytest.mark.parametrize(("module", "name", "new"), [
    ("mesh.server.deadlines", "ServerInterceptor", "mesh.ServerInterceptor"),
    ("mesh.server.deadlines", "AioServerInterceptor", "mesh.aio.ServerInterceptor"),
    ("mesh.server.gate", "ThreadGate", "mesh.ServerAdmission"),
    ("mesh.server.gate", "AioGate", "mesh.aio.ServerAdmission"),
])  # fmt: skip
def test_an_old_import_path_still_works_and_warns(module: str, name: str, new: str) -> None:
    home = importlib.import_module(module)
    expected = rf"{module}.{name} is deprecated and will be removed in 0.4: use {new}$"
    with pytest.warns(DeprecationWarning, match=expected) as caught:
        found = getattr(home, name)
    where, _, attribute = new.rpartition(".")
    assert found is getattr(importlib.import_module(where), attribute)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("module", ["mesh.server.deadlines", "mesh.server.gate"])
def test_other_names_are_not_there(module: str) -> None:
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'Unknown'"):
        importlib.import_module(module).Unknown  # noqa: B018


@pytest.mark.parametrize("kind", [mesh.server.sync.Server, mesh.server.aio.Server])
async def test_a_server_s_gate_is_its_admission(kind: Any) -> None:
    server = kind([], ServerSettings())
    with pytest.warns(DeprecationWarning, match=r"Server\.gate is deprecated .*: use Server\.admission"):
        gate = server.gate
    assert gate is server.admission
    with pytest.warns(DeprecationWarning, match=r"ServerAdmission\.admission is deprecated .*ServerAdmission\.policy"):
        assert gate.admission is server.admission.policy


@pytest.mark.parametrize(("interceptor", "admission"), [
    (ServerInterceptor, ThreadServerAdmission), (AioServerInterceptor, AioServerAdmission)
])  # fmt: skip
def test_an_interceptor_s_gate_is_its_admission(interceptor: Any, admission: Any) -> None:
    gate = admission()
    with pytest.warns(DeprecationWarning, match=r"Interceptor\(gate=\.\.\.\) is deprecated") as caught:
        assert interceptor(gate=gate)._admission is gate
    with pytest.raises(TypeError, match="not both"):
        interceptor(admission=gate, gate=gate)
    assert caught[0].filename == __file__
