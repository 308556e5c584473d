"""One parser for addresses: what one part of the mesh takes, every other part understands in the same way."""

from __future__ import annotations

from collections.abc import Callable
from concurrent import futures
from typing import Any

import grpc
import pytest

from mesh.addresses import Address, check_target, is_local, parse
from mesh.discovery.target import resolver_for
from mesh.registry import checks
from mesh.registry.__main__ import SettingError, check
from mesh.server.listening import advertised_address
from mesh.server.settings import ServerSettings
from weft.mesh.v1 import registry_pb2 as pb


class Echo(grpc.GenericRpcHandler):
    """Answers every call with its request."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return grpc.unary_unary_rpc_method_handler(lambda request, _: request)


PORT = 4711
"""The port that servers here listen on."""


def listens(text: str) -> str:
    return ServerSettings.from_env({"MESH_LISTEN": text}).listen


def registration_violations(address: str) -> checks.Violations:
    return checks.instance(pb.Instance(id="a", service="weft.A", address=address), "ipv4:127.0.0.1:1")


def advertises(text: str) -> str:
    """What is registered for a server that is told to advertise this, as the registry takes it."""
    address = advertised_address(ServerSettings.from_env({"MESH_LISTEN": "[::]:0", "MESH_ADVERTISE": text}), PORT)
    assert not registration_violations(address), address
    return address


def registers(text: str) -> str:
    violations = registration_violations(text)
    if violations:
        raise ValueError(violations[0][1])
    return text


def is_static(text: str) -> str:
    resolver = repr(resolver_for(f"static:///{text}")[1])
    return resolver.removeprefix("<StaticResolver ").removesuffix(">")


def is_dns(text: str) -> str:
    resolver = repr(resolver_for(f"dns:///{text}")[1])
    return resolver.removeprefix("<DnsResolver ").removesuffix(">")


def is_registry(text: str) -> str:
    """As ``MESH_REGISTRY``, of a server and in a target."""
    assert ServerSettings.from_env({"MESH_REGISTRY": text}).registry == text
    assert repr(resolver_for(f"mesh://{text}/a.B")[1]) == f"<RegistryResolver a.B at {text}>"
    return text


def registry_listens(text: str) -> str:
    try:
        check(text)
    except SettingError as error:
        raise ValueError(str(error)) from None
    return text


USERS: list[Callable[[str], str]] = [
    listens,
    registry_listens,
    advertises,
    registers,
    is_static,
    is_dns,
    is_registry,
]
NEED_A_PORT = [listens, registry_listens, registers, is_static, is_registry]


@pytest.mark.parametrize("user", USERS, ids=lambda user: user.__name__)
@pytest.mark.parametrize(
    "text",
    [
        "localhost:50051",
        "users.example:50051",
        "user_1.internal:50051",
        "10.0.0.1:50051",
        "[::1]:50051",
        "[fd00::2]:50051",
        "[FD00::ABCD]:50051",
        "[::ffff:10.0.0.1]:50051",
        "[fe80::1%eth0]:7",
        "[fe80::1%eth0.100]:7",
        "[fe80::1%br-lan]:7",
    ],
)
def test_host_and_port_is_an_address_everywhere(user: Callable[[str], str], text: str) -> None:
    assert user(text) == text


@pytest.mark.parametrize(
    ("text", "advertised", "resolved"),
    [
        ("users", "users:4711", "users:443"),
        ("10.0.0.1", "10.0.0.1:4711", "10.0.0.1:443"),
        ("fd00::2", "[fd00::2]:4711", "[fd00::2]:443"),
        ("[fd00::2]", "[fd00::2]:4711", "[fd00::2]:443"),
        ("fd00::abcd", "[fd00::abcd]:4711", "[fd00::abcd]:443"),
        ("fe80::1%eth0", "[fe80::1%eth0]:4711", "[fe80::1%eth0]:443"),
    ],
)
def test_a_host_alone_is_taken_where_the_port_is_known(text: str, advertised: str, resolved: str) -> None:
    assert advertises(text) == advertised
    assert is_dns(text) == resolved
    for user in NEED_A_PORT:
        with pytest.raises(ValueError, match="missing port"):
            user(text)


@pytest.mark.parametrize("user", USERS, ids=lambda user: user.__name__)
@pytest.mark.parametrize(
    "text",
    [
        "users:http",
        "users:65536",
        "users:-1",
        "users:٣",
        "users:000050051",
        "users :1",
        ":50051",
        "300.1.2.3:50051",
        "[::1",
        "[::1]50051",
        "[localhost]:50051",
        "[fe80::1%]:7",
        "[fe80::1%a b]:7",
        "::1:50051",
        "a:1:b",
        "http://users:80",
        "us\0ers:80",
        "users\x1b[31m:80",
        "[fe80::1%eth\0]:7",
        "unix:/run/a\0b",
    ],
)
def test_what_is_no_address_is_refused_everywhere(user: Callable[[str], str], text: str) -> None:
    with pytest.raises(ValueError, match=r".") as raised:
        user(text)
    assert "Traceback" not in str(raised.value)


def test_an_ipv6_address_with_a_port_but_without_brackets_is_answered_with_how_to_write_it() -> None:
    for user in NEED_A_PORT:
        with pytest.raises(ValueError, match=r"written \[::1\]:50051"):
            user("::1:50051")
        with pytest.raises(ValueError, match=r"missing port; write \[fd00::2\]:50051"):
            user("fd00::2")


@pytest.mark.parametrize("text", ["0.0.0.0:50051", "[::]:50051", "[0:0::0]:50051", "0.0.0.0", "::"])
def test_a_wildcard_is_no_address_to_call(text: str) -> None:
    with pytest.raises(ValueError, match="not a wildcard"):
        ServerSettings.from_env({"MESH_ADVERTISE": text})
    with pytest.raises(ValueError, match=r"not a wildcard|missing port"):
        registers(text)


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "[0::0]:0"])
def test_listening_on_all_interfaces_advertises_the_one_that_leads_to_the_registry(listen: str) -> None:
    settings = ServerSettings(listen=listen, registry="127.0.0.1:50050")
    assert advertised_address(settings, PORT) == "127.0.0.1:4711"
    assert advertised_address(ServerSettings(listen=listen, registry="[::1]:50050"), PORT) == "[::1]:4711"


@pytest.mark.parametrize("text", ["unix:/run/a.sock", "unix:a", "unix:///run/a.sock", "unix-abstract:a", "vsock:2:80"])
def test_a_socket_of_this_machine_is_an_address_but_of_dns(text: str) -> None:
    assert is_local(text)
    for user in (listens, registry_listens, advertises, registers, is_static):
        assert user(text) == text


@pytest.mark.parametrize("text", ["dns:///registry:50050", "ipv4:10.0.0.1:1,10.0.0.2:1", "xds:///registry", "unix:/r"])
def test_the_registry_may_be_another_target_of_grpcs(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_target(text)
    assert ServerSettings.from_env({"MESH_REGISTRY": text}).registry == text
    monkeypatch.setenv("MESH_REGISTRY", text)
    assert repr(resolver_for("mesh:///a.B")[1]) == f"<RegistryResolver a.B at {text}>"


def test_it_is_written_as_it_is_read() -> None:
    for text in ("users:1", "[::1]:1", "[fe80::1%eth0]:1"):
        assert str(parse(text)) == text
    assert parse("users", port=7) == Address("users", 7)
    assert parse("users:0", min_port=0) == Address("users", 0)
    assert not Address("users", 1).is_wildcard


@pytest.mark.parametrize("host", ["[::1]", "[::1%1]", "127.0.0.1", "localhost"])
def test_grpc_calls_what_the_parser_takes(host: str) -> None:
    threads = futures.ThreadPoolExecutor(1)
    server = grpc.server(threads, handlers=[Echo()])
    try:
        listen = parse(f"{host}:0", min_port=0)
        port = server.add_insecure_port(str(listen))
        server.start()
        with grpc.insecure_channel(str(listen._replace(port=port))) as channel:
            call: Callable[..., bytes] = channel.unary_unary("/a.B/Echo")
            assert call(b"here", timeout=10) == b"here"
    finally:
        server.stop(None).wait()
        threads.shutdown()
