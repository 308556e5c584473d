"""Credentials, and whose name the servers must prove: as grpc has it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import grpc.aio
import pytest
import trustme

import mesh
import mesh.aio
from tests.channel.suite import UNARY, Server
from tests.registry.serving import instance, serving

NAME = "proven.example"
AUTHORITY, OVERRIDE = "grpc.default_authority", "grpc.ssl_target_name_override"
WORLDS: dict[str, Any] = {"sync": mesh, "aio": mesh.aio}
PLAIN: dict[str, Any] = {"sync": grpc, "aio": grpc.aio}


# -- what is no credentials


NO_CREDENTIALS = (
    None,
    "secret",
    object,
    grpc.ssl_server_credentials([(b"", b"")]),
    grpc.access_token_call_credentials("x"),
)


@pytest.mark.parametrize("credentials", NO_CREDENTIALS)
@pytest.mark.parametrize("world", WORLDS)
def test_what_is_no_credentials_is_refused_at_once(world: str, credentials: Any) -> None:
    with pytest.raises(TypeError, match=r"credentials: expected grpc\.ChannelCredentials, got .*insecure_channel"):
        WORLDS[world].secure_channel("static:///127.0.0.1:1", credentials)


@pytest.mark.parametrize("world", WORLDS)
def test_arguments_of_a_wrong_type_are_refused_at_once(world: str) -> None:
    make = WORLDS[world].insecure_channel
    for target in (None, 5):
        with pytest.raises(TypeError, match="target: expected a string"):
            make(target)
    with pytest.raises(TypeError, match=r"compression: expected grpc\.Compression, got 'gzip'"):
        make("static:///127.0.0.1:1", compression="gzip")
    with pytest.raises(TypeError, match="options: expected a string as the name, got 1"):
        make("static:///127.0.0.1:1", [(1, 2)])
    with pytest.raises(TypeError, match=r"channel option 'grpc\.x'"):
        make("static:///127.0.0.1:1", [("grpc.x", None)])


def test_a_target_may_be_bytes(server: Server) -> None:
    plain: Any = grpc.insecure_channel
    blocking: Any = mesh.insecure_channel
    for make, target in (
        (plain, server.address),
        (blocking, server.address),
        (blocking, f"static:///{server.address}"),
    ):
        with make(target.encode()) as channel:
            assert channel.unary_unary(UNARY)(b"ok", timeout=5) == b"ok"


def test_call_arguments_of_a_wrong_type_are_refused_at_once(server: Server) -> None:
    channel: Any = mesh.insecure_channel(f"static:///{server.address}")
    with channel:
        unary = channel.unary_unary(UNARY)
        for call in (unary, unary.with_call, unary.future, channel.unary_stream(UNARY)):
            with pytest.raises(TypeError, match=r"expected grpc\.CallCredentials, got 'secret'"):
                call(b"ok", timeout=5, credentials="secret")
            with pytest.raises(TypeError, match=r"expected grpc\.Compression"):
                call(b"ok", timeout=5, compression="gzip")


async def test_aio_call_arguments_of_a_wrong_type_are_refused_at_once(server: Server) -> None:
    channel: Any = mesh.aio.insecure_channel(f"static:///{server.address}")
    async with channel:
        with pytest.raises(TypeError, match=r"expected grpc\.CallCredentials, got 'secret'"):
            channel.unary_unary(UNARY)(b"ok", timeout=5, credentials="secret")
        with pytest.raises(TypeError, match=r"expected grpc\.Compression"):
            channel.unary_unary(UNARY)(b"ok", timeout=5, compression="gzip")


# -- whose name is proven


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def proving(authority: trustme.CA) -> Iterator[Server]:
    """A server whose certificate is of NAME alone."""
    certificate = authority.issue_cert(NAME)
    chain = b"".join(pem.bytes() for pem in certificate.cert_chain_pems)
    server = Server(grpc.ssl_server_credentials([(certificate.private_key_pem.bytes(), chain)]))
    yield server
    server.stop()


def outcome(world: Any, target: str, credentials: Any, options: Any) -> str:
    """The code of a call, made in a thread with a loop of its own; and what it was answered."""

    async def asynchronous() -> str:
        make = world.insecure_channel(target, options) if credentials is None else None
        async with make or world.secure_channel(target, credentials, options) as channel:
            try:
                return bytes(await channel.unary_unary(UNARY)(b"ok", timeout=5)).decode()
            except grpc.aio.AioRpcError as error:
                return error.code().name

    def blocking() -> str:
        make = world.insecure_channel(target, options) if credentials is None else None
        with make or world.secure_channel(target, credentials, options) as channel:
            try:
                return bytes(channel.unary_unary(UNARY)(b"ok", timeout=5)).decode()
            except grpc.RpcError as error:
                return str(error.code().name)

    return asyncio.run(asynchronous()) if "aio" in world.__name__ else blocking()


OPTIONS: dict[str, list[tuple[str, str]]] = {
    "neither": [],
    "override": [(OVERRIDE, NAME)],
    "authority": [(AUTHORITY, NAME)],
    "both": [(OVERRIDE, NAME), (AUTHORITY, NAME)],
    "override, other authority": [(OVERRIDE, NAME), (AUTHORITY, "other.example")],
    "authority, other override": [(OVERRIDE, "other.example"), (AUTHORITY, NAME)],
    "a wrong override": [(OVERRIDE, "other.example")],
    "a wrong authority": [(AUTHORITY, "other.example")],
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("world", WORLDS)
def test_the_name_that_a_user_gives_is_proven_as_in_grpc(
    world: str, options: str, authority: trustme.CA, proving: Server
) -> None:
    credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    target = f"dns:///127.0.0.1:{proving.port}"
    given = OPTIONS[options]
    expected = outcome(PLAIN[world], target, credentials, given)
    assert outcome(WORLDS[world], target, credentials, given) == expected


@pytest.mark.parametrize("options", OPTIONS)
def test_plaintext_takes_any_name(options: str, server: Server) -> None:
    for world, make in (("sync", mesh), ("aio", mesh.aio)):
        assert outcome(make, f"dns:///127.0.0.1:{server.port}", None, OPTIONS[options]) == "ok", world


@pytest.mark.parametrize(
    ("options", "expected"),
    [("neither", "UNAVAILABLE"), ("override", "ok"), ("authority", "ok"), ("both", "ok")],
)
async def test_the_name_that_a_user_gives_is_proven_over_mesh(
    options: str, expected: str, authority: trustme.CA, proving: Server
) -> None:
    """The service's own name is not what this certificate proves."""
    credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    async with serving() as registry:
        await registry.register(instance("one", service="suite.Suite", address=proving.address))
        given = [*OPTIONS[options], ("grpc.service_config", '{"healthCheckConfig": {}}')]
        target = f"mesh://{registry.address}/suite.Suite"
        async with mesh.aio.secure_channel(target, credentials, given) as channel:
            unary: Any = channel.unary_unary(UNARY)
            try:
                answer = bytes(await unary(b"ok", timeout=5)).decode()
            except grpc.aio.AioRpcError as error:
                answer = error.code().name
        assert answer == expected
