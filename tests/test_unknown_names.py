"""Misspelt keys, services, methods and variables are named, with what was likely meant, and never refused."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

import mesh
from mesh import variables
from mesh.config.descriptors import unknown_names
from mesh.config.parse import parse
from mesh.config.settings import ServiceConfig
from mesh.config.sources import ConfigSources, Source
from mesh.server.settings import ServerSettings
from services.common.settings import Settings
from services.events.settings import EventSettings
from services.order.settings import OrderSettings
from tests.processes import Spawn
from tests.registry.serving import USER, serving
from weft.mesh.v1 import registry_pb2 as pb
from weft.user.v1 import user_pb2  # noqa: F401 - its descriptor is what is loaded

ROOT = Path(__file__).resolve().parent.parent
RETRY: dict[str, Any] = {
    "maxAttempts": 3,
    "initialBackoff": "0.1s",
    "maxBackoff": "1s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}


def config(**further: object) -> str:
    return json.dumps({"methodConfig": [{"name": [{"service": USER}], "retryPolicy": RETRY}], **further})


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ({"methodconfig": []}, "methodconfig: unknown key, ignored; did you mean 'methodConfig'?"),
        (
            {"methodConfig": [{"hedgingPolicy": {"maxAttempts": 2, "hedginDelay": "1s"}}]},
            "methodConfig[0].hedgingPolicy.hedginDelay: unknown key, ignored; did you mean 'hedgingDelay'?",
        ),
        (
            {"methodConfig": [{"name": [{"servce": USER}]}]},
            "methodConfig[0].name[0].servce: unknown key, ignored; did you mean 'service'?",
        ),
        (
            {"retryBudget": {"burst": 1}},
            "retryBudget.burst: unknown key, ignored; known: minPerSecond, ratio",
        ),
        (
            {"loadBalancingConfig": [{"peak_ewma": {"loadReports": {"blackout": "1s"}}}]},
            "loadBalancingConfig[0].peak_ewma.loadReports.blackout: unknown key, ignored; did you mean 'blackoutPeri",
        ),
        (
            {"loadBalancingConfig": [{"leest_request": {}}, {"round_robin": {}}]},
            "loadBalancingConfig[0]: unknown policy leest_request, skipped; did you mean 'least_request'?",
        ),
        ({"a b\n": 1}, '"a b\\n": unknown key, ignored; known: healthCheckConfig, loadBalancingConfig, '),
        ({"round_robin": {}}, "round_robin: unknown key, ignored; known: "),
    ],
)
def test_an_unknown_key_is_named_with_its_path_and_the_nearest_known_one(text: object, warning: str) -> None:
    (found,) = parse(json.dumps(text)).warnings
    assert found.startswith(warning)


@pytest.mark.parametrize(
    "text",
    [
        {"loadBalancingConfig": [{"grpclb": {}}, {"xds_wrr_locality_experimental": {}}, {"round_robin": {}}]},
        {
            "loadBalancingConfig": [
                {
                    "priority_experimental": {
                        "children": {"any name": {"config": [{"round_robin": {}}]}, "spare": {}},
                        "priorities": ["any name"],
                    }
                }
            ]
        },
        {"healthCheckConfig": None},
    ],
)
def test_what_other_clients_know_and_what_the_config_names_itself_is_no_slip(text: object) -> None:
    assert parse(json.dumps(text)).warnings == ()


def test_what_core_reads_itself_is_no_slip() -> None:
    text = json.dumps({"loadBalancingConfig": [{"leest_request": {"x": 1}}], "loadBalancingPolicy": "round_robin"})
    assert parse(text, balanced_by_core=True).warnings == ()


def test_warnings_do_not_tell_two_configs_apart_and_are_bounded() -> None:
    strange = {f"key{index}": 1 for index in range(1000)}
    parsed = parse(config(**strange))
    assert parsed == parse(config())
    assert len(parsed.warnings) == 21
    assert parsed.warnings[-1] == "980 more"


def named(*names: tuple[str, str]) -> ServiceConfig:
    each = [{"service": service, "method": method} for service, method in names]
    return parse(json.dumps({"methodConfig": [{"name": each}]}))


@pytest.mark.parametrize(
    ("names", "warnings"),
    [
        ([(USER, "GetUser"), (USER, ""), ("", "")], ()),
        ([(USER, "GetUsr")], (f"methodConfig: {USER} has no method 'GetUsr'; did you mean 'GetUser'?",)),
        ([("not.loaded.Service", "Anything")], ()),
    ],
)
def test_methods_are_checked_where_their_descriptor_is_loaded(
    names: list[tuple[str, str]], warnings: tuple[str, ...]
) -> None:
    assert unknown_names(named(*names)) == warnings


def test_a_method_that_is_like_none_is_named_with_all_there_are() -> None:
    (warning,) = unknown_names(named((USER, "Zzz")))
    assert warning.startswith(f"methodConfig: {USER} has no method 'Zzz'; known: BatchGetUsers, CreateUser, ")


@pytest.mark.parametrize("slip", ["weft.user.v1.UserServise", "weft.usr.v1.UserService", "weft.user.v1.Userservice"])
def test_a_service_is_named_when_it_is_nearly_one_that_is_loaded(slip: str) -> None:
    warning = f"methodConfig: unknown service {slip!r}; did you mean {USER!r}?"
    assert unknown_names(named((slip, ""))) == (warning,)


def test_a_service_is_named_when_it_is_nearly_the_channels() -> None:
    (warning,) = unknown_names(named(("not.loaded.Servise", "")), ["not.loaded.Service"])
    assert warning == "methodConfig: unknown service 'not.loaded.Servise'; did you mean 'not.loaded.Service'?"


@pytest.mark.parametrize(
    "service", ["weft.user.v3.UserService", "weft.buyer.v1.BuyerService", "weft.users.v1.OwnerService", USER + ".Admin"]
)
def test_a_service_of_another_process_is_no_slip(service: str) -> None:
    assert unknown_names(named((service, "Anything"))) == ()


def test_a_channel_logs_each_warning_once_for_a_source_and_text(caplog: pytest.LogCaptureFixture) -> None:
    for source in (Source.FILE, Source.REGISTRY, Source.FILE):
        configs = ConfigSources("warned of once", service=USER)
        configs.update(source, config(methodconfig=[]))
    logged = [(record.levelno, record.name, record.getMessage()) for record in caplog.records]
    what = "methodconfig: unknown key, ignored; did you mean 'methodConfig'?"
    assert logged == [
        (logging.WARNING, "mesh.config", f"warned of once: service config from the {source}: {what}")
        for source in ("file", "registry")
    ]


def test_a_channel_warns_of_its_option_and_works(caplog: pytest.LogCaptureFixture) -> None:
    text = json.dumps({"methodConfig": [{"name": [{"service": USER, "method": "GetUsr"}], "timeout": "1s"}]})
    with mesh.insecure_channel(f"mesh://127.0.0.1:1/{USER}", [("grpc.service_config", text)]):
        assert f"from the option: methodConfig: {USER} has no method 'GetUsr'" in caplog.text


async def test_the_registry_answers_with_the_warnings_and_takes_the_config() -> None:
    text = config(methodconfig=[])
    async with serving() as registry:
        answer = await registry.stub.SetServiceConfig(pb.SetServiceConfigRequest(service=USER, service_config=text))
        assert list(answer.warnings) == ["methodconfig: unknown key, ignored; did you mean 'methodConfig'?"]
        got = await registry.stub.GetServiceConfig(pb.GetServiceConfigRequest(service=USER))
        assert got.service_config == text
        answer = await registry.stub.SetServiceConfig(pb.SetServiceConfigRequest(service=USER))
        assert not answer.warnings


# -- environment variables


def test_an_unknown_variable_is_named_with_the_nearest_known_one() -> None:
    assert variables.unknown(["PATH", "MESH_REGISTRI", "MESH_ZONE", "MESH_X"]) == [
        "MESH_REGISTRI: unknown environment variable, ignored; did you mean 'MESH_REGISTRY'?",
        "MESH_X: unknown environment variable, ignored",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "MESH_REGISTRY_SERVICE_HOST",
        "MESH_REGISTRY_SERVICE_PORT",
        "MESH_REGISTRY_SERVICE_PORT_GRPC",
        "MESH_REGISTRY_PORT",
        "MESH_REGISTRY_PORT_50050_TCP",
        "MESH_REGISTRY_PORT_50050_TCP_ADDR",
    ],
)
def test_what_kubernetes_sets_for_a_service_named_mesh_registry_is_no_slip(name: str) -> None:
    assert variables.unknown([name]) == []


TWO_CHANNELS = """
import logging, mesh
logging.basicConfig(format="%(levelname)s %(message)s")
for _ in range(2):
    mesh.insecure_channel("static:///127.0.0.1:1").close()
"""


@pytest.mark.slow
def test_a_process_warns_once(spawn: Spawn) -> None:
    program = spawn.python("-c", TWO_CHANNELS, environment={"MESH_REGISTRI": "127.0.0.1:1"})
    assert program.wait() == 0
    assert program.said == (
        "WARNING MESH_REGISTRI: unknown environment variable, ignored; did you mean 'MESH_REGISTRY'?\n"
    )


def test_the_list_has_every_variable_that_anything_reads_and_no_other() -> None:
    used = {
        name.rstrip("_")
        for folder in ("mesh", "services")
        for file in (ROOT / folder).rglob("*.py")
        if file.name != "variables.py"
        for name in re.findall(r"\bMESH_[A-Z_]*[A-Z]\b", file.read_text())
    }
    used |= {
        f"MESH_{field.upper()}" for kind in (Settings, EventSettings, OrderSettings) for field in kind.model_fields
    }
    used |= {f"MESH_{each}" for each in ("REGION", "ZONE", "SUB_ZONE")}
    assert used == variables.KNOWN.keys(), "mesh/variables.py is the list"


def test_the_list_of_servers_is_their_settings() -> None:
    fields = {each.metadata.get("variable") for each in ServerSettings.__dataclass_fields__.values()} - {None}
    assert fields == variables.SERVERS.keys() | {"MESH_REGISTRY", "MESH_REGION", "MESH_ZONE", "MESH_SUB_ZONE"}
