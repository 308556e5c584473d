"""docs/statuses.md has every status that the mesh makes, with the words that the mesh uses."""

from __future__ import annotations

import ast
import functools
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

import mesh
from docs.statuses import STATUSES, Status
from mesh import ServerSettings
from tests.channel.suite import UNARY, Server
from tests.processes import Spawn, eventually
from weft.mesh.v1 import registry_pb2, registry_pb2_grpc

ROOT = Path(__file__).resolve().parent.parent.parent
ROWS = [row for _, rows in STATUSES.values() for row in rows]

MADE_ELSEWHERE = {
    "cluster.explain_no_endpoint(picker, now)",  # policy: Picker.error and describe(), tested below
    "picker.error",
    "why",
    "full",  # the registry's refusals for want of room, tested below
    "text",  # the registry's violations, tested below
    "str(error)",  # UnparsableError, whose text is another site's
}
"""Details that are no text where the status is made."""

MAKERS = {
    "explain_no_endpoint",
    "describe",
    "_one",
    "refusal",
    "config_refusal",
    "instance",
    "service",
    "_address",
    "_only_here",
    "page",
}
"""Functions whose texts become such details."""


class Made(NamedTuple):
    """A place that makes a status: its code ("" where that varies), and a pattern of its text or, where it has none of
    its own, the expression."""

    code: str
    text: str
    is_pattern: bool


# In mesh.testing a test says what calls end with.
FILES = [file for file in sorted((ROOT / "mesh").rglob("*.py")) if ROOT / "mesh" / "testing" not in file.parents]
TREES = [ast.parse(file.read_text()) for file in FILES]
CONSTANTS = {
    target.id: node.value.value
    for tree in TREES
    for node in tree.body
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    for target in node.targets
    if isinstance(target, ast.Name)
}


def literals(tree: ast.AST) -> Iterator[str]:
    """The strings in ``tree`` that are no docstrings."""
    quiet = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in quiet:
            yield node.value


def patterns(value: ast.expr, function: ast.AST) -> list[str]:
    """Patterns of what a text in ``function`` may be; none where that isn't written here."""
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return [re.escape(value.value)]
    if isinstance(value, ast.JoinedStr):
        return [
            "".join(re.escape(str(each.value)) if isinstance(each, ast.Constant) else ".+" for each in value.values)
        ]
    if not isinstance(value, ast.Name):
        return []
    if value.id in CONSTANTS:
        return [re.escape(CONSTANTS[value.id])]
    found = []
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and any(ast.unparse(target) == value.id for target in node.targets):
            found += patterns(node.value, function)
        elif isinstance(node, ast.arguments):
            for argument, default in zip(reversed(node.args), reversed(node.defaults), strict=False):
                found += patterns(default, function) if argument.arg == value.id else []
    return found


def made(node: ast.AST, function: ast.AST) -> Iterator[Made]:
    """The places in ``node`` that make a status with a text."""
    given: list[ast.expr] = []
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("Outcome", "abort"):
        given = node.args[:2]
    elif isinstance(node, ast.Tuple):
        given = node.elts[:2]
    if len(given) == 2:
        code, text = (ast.unparse(each) for each in given)
        literal = re.fullmatch(r"(?:Code|grpc\.StatusCode)\.([A-Z_]+)", code)
        if literal or (isinstance(node, ast.Call) and code.endswith("code")):
            name = literal[1] if literal else ""
            texts = patterns(given[1], function)
            yield from (Made(name, each, True) for each in texts)
            if name and not texts:
                yield Made(name, text, False)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        function = node
    for child in ast.iter_child_nodes(node):
        yield from made(child, function)


WRITTEN = [text for tree in TREES for text in literals(tree)]
MADE = [each for tree in TREES for each in made(tree, tree)]


def without_bars(row: Status) -> str:
    return row.message.replace("|", "")


def pattern_of(row: Status) -> str:
    """What matches the row's messages."""
    return re.sub(r"<[^>]*>", ".+", re.escape(without_bars(row)).replace(r"\<", "<").replace(r"\>", ">"))


def test_every_status_that_is_made_is_on_the_page() -> None:
    found = [each for each in MADE if each.is_pattern]
    assert len(found) > 30
    missing = [
        each
        for each in found
        if not any(each.code in ("", row.code) and re.match(each.text, without_bars(row)) for row in ROWS)
    ]
    assert missing == [], "add them to docs/statuses.py, then: make docs"


def test_details_that_are_made_elsewhere_are_known() -> None:
    unknown = {each.text for each in MADE if not each.is_pattern} - MADE_ELSEWHERE
    assert unknown == set(), "have docs/statuses.py say what they are, and name them here"


def test_what_functions_put_together_is_on_the_page() -> None:
    functions = [
        node
        for tree in TREES
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name in MAKERS
    ]
    assert {function.name for function in functions} == MAKERS
    texts = {text for function in functions for text in literals(function) if " " in text.strip(": ")}
    assert len(texts) > 20
    page = [without_bars(row) + row.cause for row in ROWS]
    assert [text for text in sorted(texts) if not any(text in row for row in page)] == []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.message[:60])
def test_a_message_has_the_code_s_own_words(row: Status) -> None:
    parts = [part for part in re.split(r"<[^>]*>|\|", row.message) if part]
    assert [part for part in parts if not any(part in text for text in WRITTEN)] == []


# -- seen in life: a part of the page, with real processes and sockets

WITHIN = 20.0
NAME = "test.Statuses"


def fails_as(beginning: str, call: Callable[[], object]) -> None:
    """``call`` fails with the status whose message begins so on the page."""
    row = next(row for row in ROWS if without_bars(row).startswith(beginning))
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    assert error.code().name == row.code
    assert re.fullmatch(pattern_of(row), error.details()), error.details()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


def calling(target: str, **config: Any) -> Any:
    """A channel, for ``with``."""
    return mesh.insecure_channel(target, options=[("grpc.service_config", json.dumps(config))])


class TestClients:
    def test_an_endpoint_that_nobody_listens_on(self, free_port: Callable[[], int]) -> None:
        with calling(f"static:///127.0.0.1:{free_port()}") as channel:
            fails_as("<target>: <address>: <cause>", lambda: channel.unary_unary(UNARY)(b"ok", timeout=WITHIN))

    def test_several_of_them(self, free_port: Callable[[], int]) -> None:
        with calling(f"static:///127.0.0.1:{free_port()},127.0.0.1:{free_port()}") as channel:
            fails_as(
                "<target>: <ready> of <all> endpoints connected: <address>",
                lambda: channel.unary_unary(UNARY)(b"ok", timeout=WITHIN),
            )

    def test_a_deadline_that_comes_first(self, free_port: Callable[[], int], server: Server) -> None:
        with calling(f"static:///127.0.0.1:{free_port()}") as channel:
            wait = {"timeout": 0.05, "wait_for_ready": True}
            fails_as(
                "<target>: <ready> of <all> endpoints connected after",
                lambda: channel.unary_unary(UNARY)(b"ok", **wait),
            )
        with calling(f"static:///{server.address}") as channel:
            channel.unary_unary(UNARY)(b"ok", timeout=WITHIN)
            fails_as("the deadline had passed", lambda: channel.unary_unary(UNARY)(b"ok", timeout=0))

    def test_an_attempt_timeout(self, server: Server) -> None:
        methods = [{"name": [{}], "attemptTimeout": "0.05s"}]
        with calling(f"static:///{server.address}", methodConfig=methods) as channel:
            fails_as("no response within", lambda: channel.unary_unary(UNARY)(b"hang", timeout=WITHIN))
        server.wait_until_idle()

    def test_a_call_too_many(self, server: Server) -> None:
        with calling(f"static:///{server.address}", overload={"maxOutstanding": 1}) as channel:
            hanging = channel.unary_unary(UNARY).future(b"hang", timeout=WITHIN)
            server.wait_until_busy()
            fails_as("refused by the client", lambda: channel.unary_unary(UNARY)(b"ok", timeout=WITHIN))
            hanging.cancel()
        server.wait_until_idle()

    def test_calls_that_end_here(self, server: Server) -> None:
        with calling(f"static:///{server.address}") as channel:
            method = channel.unary_unary(UNARY)
            fails_as("Invalid metadata", lambda: method(b"ok", metadata=[("No Key", "")], timeout=WITHIN))
            call = method.future(b"hang", timeout=WITHIN)
            server.wait_until_busy()
        assert (call.code().name, call.details()) == ("CANCELLED", "Channel closed!")
        server.wait_until_idle()


def add(servicer: Any, server: Any) -> None:
    """As generated code does it."""

    def parse(request: bytes) -> bytes:
        if request == b"bad":
            raise ValueError
        return request

    def stream(request: bytes, context: Any) -> Iterator[bytes]:
        yield servicer(request, context)

    handlers: dict[str, Any] = {
        "Unary": grpc.unary_unary_rpc_method_handler(servicer, request_deserializer=parse),
        "Stream": grpc.unary_stream_rpc_method_handler(stream, request_deserializer=parse),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, handlers),))


class TestServers:
    def test_what_a_handler_ends_with(self) -> None:
        def handle(request: bytes, context: Any) -> bytes:
            raise RuntimeError("secret")

        settings = ServerSettings(listen="127.0.0.1:0", drain_wait=0)
        with (
            mesh.Server([(add, handle)], settings) as server,
            grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        ):
            method: Any = channel.unary_unary(f"/{NAME}/Unary")
            fails_as("internal error", lambda: method(b"good", timeout=WITHIN))
            fails_as("the request's bytes", lambda: method(b"bad", timeout=WITHIN))
            health = health_pb2_grpc.HealthStub(channel)
            fails_as(
                "unknown service", lambda: health.Check(health_pb2.HealthCheckRequest(service="X"), timeout=WITHIN)
            )

    def test_refusals(self) -> None:
        go, ready = threading.Event(), threading.Event()

        def handle(request: bytes, context: Any) -> bytes:
            go.wait(WITHIN)
            return request

        settings = ServerSettings(
            listen="127.0.0.1:0", drain_wait=0, max_workers=1, queue_size=0, max_streams=1, ready=ready.is_set
        )
        with (
            mesh.Server([(add, handle)], settings) as server,
            grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        ):
            unary: Any = channel.unary_unary(f"/{NAME}/Unary")
            stream: Any = channel.unary_stream(f"/{NAME}/Stream")
            fails_as("not ready yet", lambda: unary(b"", timeout=WITHIN))
            ready.set()
            health = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest()
            eventually(lambda: health.Check(request, timeout=WITHIN).status == health_pb2.HealthCheckResponse.SERVING)
            opened = stream(b"", timeout=WITHIN)
            eventually(lambda: server.admission.policy.streams == 1)
            fails_as("too many streams", lambda: next(stream(b"", timeout=WITHIN)))
            running = unary.future(b"", timeout=WITHIN)
            eventually(lambda: server.admission.policy.in_flight == 1)
            fails_as("overloaded: the queue is full", lambda: unary(b"", timeout=WITHIN))
            go.set()
            assert list(opened) == [b""]
            assert running.result() == b""


class TestRegistries:
    @pytest.mark.slow
    def test_its_answers(self, free_port: Callable[[], int], spawn: Spawn) -> None:
        with calling(f"mesh://127.0.0.1:{free_port()}/{NAME}") as channel:
            fails_as("<target>: registry <address>: <code>", lambda: channel.unary_unary("/X/Y")(b"", timeout=WITHIN))
        address = f"127.0.0.1:{free_port()}"
        spawn.python("-m", "mesh.registry", "--listen", address).wait_for("serving on")
        with calling(f"mesh://{address}/{NAME}") as channel:
            fails_as(
                "<target>: registry <address> has no instances of <service>; known services: none",
                lambda: channel.unary_unary("/X/Y")(b"", timeout=WITHIN),
            )
        with grpc.insecure_channel(address) as channel:
            registry = registry_pb2_grpc.RegistryStub(channel)

            def register(**fields: Any) -> object:
                instance = registry_pb2.Instance(**{"id": "1", "service": NAME, "address": "10.0.0.1:1", **fields})
                return registry.Register(registry_pb2.RegisterRequest(instance=instance), timeout=WITHIN)

            for beginning, field in (
                ("<field>: must be a service's full name", {"service": "no name"}),
                ("<field>: must be set", {"id": ""}),
                ("<field>: must be an address that other hosts can reach, not", {"address": "0.0.0.0:1"}),
                ("<field>: contains an unprintable", {"id": "\n"}),
                ("<field>: must be from 1", {"weight": 10**6}),
                ("<field>: is longer", {"id": "x" * 2000}),
            ):
                fails_as(beginning, functools.partial(register, **field))
            wrong = registry_pb2.SetServiceConfigRequest(service=NAME, service_config='{"methodConfig": 1}')
            fails_as("service_config.", lambda: registry.SetServiceConfig(wrong, timeout=WITHIN))
