"""The registry over the network: what services and their clients may count on."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status  # type: ignore[import-untyped]

from tests.registry.serving import BOUND, ORDER, USER, Serving, eventually, instance, serving
from weft.mesh.v1 import registry_pb2 as pb
from weft.mesh.v1 import registry_pb2_grpc as pb_grpc


@pytest.fixture
async def registry() -> AsyncIterator[Serving]:
    async with serving() as registry:
        yield registry


class Watcher:
    """A client's view of a service, kept as the contract says."""

    def __init__(self, registry: Serving, service: str = USER, epoch: str = "", revision: int = 0) -> None:
        self.call = registry.stub.Watch(pb.WatchRequest(service=service, epoch=epoch, revision=revision))
        self.ids: set[str] = set()
        self.steps = 0

    async def next(self) -> pb.WatchResponse:
        async with asyncio.timeout(BOUND):
            step = await self.call.read()
        assert isinstance(step, pb.WatchResponse)
        if step.HasField("snapshot"):
            self.ids = {each.id for each in step.snapshot.instances}
        self.ids |= {each.id for each in step.delta.upserted}
        self.ids -= set(step.delta.removed_ids)
        self.steps += 1
        return step

    async def until(self, ids: set[str]) -> None:
        while self.ids != ids:
            await self.next()


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        async with asyncio.timeout(BOUND):
            await call
    return raised.value


async def test_what_is_registered_is_listed_by_service_and_id(registry: Serving) -> None:
    for each in (instance("b"), instance("a"), instance("o", ORDER)):
        await registry.register(each)

    everything = await registry.stub.ListInstances(pb.ListInstancesRequest())
    assert list(everything.instances) == [instance("o", ORDER), instance("a"), instance("b")]
    assert (everything.epoch, everything.revision) == (registry.book.epoch, 3)

    users = await registry.stub.ListInstances(pb.ListInstancesRequest(service=USER))
    assert list(users.instances) == [instance("a"), instance("b")]
    nobody = await registry.stub.ListInstances(pb.ListInstancesRequest(service="no.Such"))
    assert list(nobody.instances) == []


async def test_a_watcher_gets_a_snapshot_and_then_each_change(registry: Serving) -> None:
    await registry.register(instance("a"))
    watcher = Watcher(registry)

    first = await watcher.next()
    assert list(first.snapshot.instances) == [instance("a")]
    assert (first.epoch, first.revision) == (registry.book.epoch, 1)

    lease = await registry.register(instance("b"))
    assert list((await watcher.next()).delta.upserted) == [instance("b")]

    await registry.stub.Deregister(pb.DeregisterRequest(lease_id=lease))
    last = await watcher.next()
    assert list(last.delta.removed_ids) == ["b"]
    assert last.revision == 3


async def test_the_watcher_of_a_service_that_nobody_serves_is_told_so_at_once(registry: Serving) -> None:
    step = await Watcher(registry).next()
    assert step.HasField("snapshot")
    assert list(step.snapshot.instances) == []


async def test_a_change_is_told_to_the_watchers_of_its_service_only(registry: Serving) -> None:
    users, orders = Watcher(registry, USER), Watcher(registry, ORDER)
    await users.next()
    await orders.next()

    await registry.register(instance("a", USER))
    await registry.register(instance("a", USER))  # again, unchanged: no news to anyone
    await registry.register(instance("o", ORDER))

    await users.until({"a"})
    await orders.until({"o"})
    assert (users.steps, orders.steps) == (2, 2)


async def test_a_watcher_that_was_cut_off_resumes_where_it_was(registry: Serving) -> None:
    watcher = Watcher(registry)
    await registry.register(instance("a"))
    await watcher.until({"a"})
    watcher.call.cancel()
    seen = registry.book.revision

    again = Watcher(registry, epoch=registry.book.epoch, revision=seen)
    assert not (await again.next()).delta.ListFields(), "it learns at once that it has missed nothing"
    again.call.cancel()

    await registry.register(instance("b"))
    missed = await Watcher(registry, epoch=registry.book.epoch, revision=seen).next()
    assert [each.id for each in missed.delta.upserted] == ["b"]


async def test_what_another_life_of_the_registry_has_told_is_told_anew(registry: Serving) -> None:
    await registry.register(instance("a"))
    step = await Watcher(registry, epoch="another life", revision=1).next()
    assert [each.id for each in step.snapshot.instances] == ["a"]


async def test_a_watcher_that_fell_behind_the_log_gets_a_snapshot() -> None:
    async with serving(log_size=2) as registry:
        for each in "abc":
            await registry.register(instance(each))
        step = await Watcher(registry, epoch=registry.book.epoch, revision=0).next()
        assert [each.id for each in step.snapshot.instances] == ["a", "b", "c"]


@pytest.mark.slow
async def test_a_watcher_that_never_reads_delays_nobody_and_catches_up_when_it_does(registry: Serving) -> None:
    # A window that doesn't grow with what the network could carry, so that it is soon full.
    options = [("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(registry.address, options=options) as channel:
        stuck = Watcher(dataclasses.replace(registry, stub=pb_grpc.RegistryStub(channel)))
        lively = Watcher(registry)
        ids = {str(n) for n in range(2_000)}
        for each in sorted(ids):
            await registry.register(instance(each, label="x" * 500))

        await lively.until(ids)
        assert len(registry.service._watchers[USER]) == 2, "it is still there"

        await stuck.until(ids)
        assert stuck.steps < len(ids) / 2, "what it missed was told together, and not kept for it one by one"


@pytest.mark.slow
async def test_a_lease_that_ends_is_told_to_every_watcher(registry: Serving) -> None:
    watchers = [Watcher(registry) for _ in range(3)]
    await registry.stub.Register(pb.RegisterRequest(instance=instance("brief"), ttl=Duration(seconds=1)))
    await registry.register(instance("lasting"))

    for watcher in watchers:
        await watcher.until({"lasting", "brief"})
        await watcher.until({"lasting"})


async def test_one_stream_renews_all_leases_of_a_process_and_names_the_unknown(registry: Serving) -> None:
    leases = [await registry.register(instance(each)) for each in "ab"]
    stream = registry.stub.KeepAlive()
    for _ in range(2):
        await stream.write(pb.KeepAliveRequest(lease_ids=["of another life", *leases]))
        answer = await stream.read()
        assert isinstance(answer, pb.KeepAliveResponse)
        assert list(answer.unknown_lease_ids) == ["of another life"]
    await stream.done_writing()
    assert await stream.code() is grpc.StatusCode.OK


@pytest.mark.slow
async def test_keep_alives_hold_a_lease_and_their_stream_breaking_does_not_end_it(registry: Serving) -> None:
    watcher = Watcher(registry)
    ttl = Duration(seconds=1)
    granted = await registry.stub.Register(pb.RegisterRequest(instance=instance("kept"), ttl=ttl))
    await registry.stub.Register(pb.RegisterRequest(instance=instance("not kept"), ttl=ttl))
    await watcher.until({"kept", "not kept"})

    stream = registry.stub.KeepAlive()
    ends = asyncio.create_task(watcher.until({"kept"}))  # the lease that was granted later, and isn't renewed
    while not ends.done():
        await stream.write(pb.KeepAliveRequest(lease_ids=[granted.lease_id]))
        answer = await stream.read()
        assert isinstance(answer, pb.KeepAliveResponse)
        assert not answer.unknown_lease_ids
        await asyncio.wait([ends], timeout=0.1)
    await ends

    stream.cancel()
    await eventually(lambda: len(registry.service._streams) == 1)
    assert registry.book.snapshot(USER), "its process may come back before the lease ends"
    await watcher.until(set())


async def test_deregistering_what_is_not_known_is_no_error(registry: Serving) -> None:
    await registry.stub.Deregister(pb.DeregisterRequest(lease_id="never"))


@pytest.mark.parametrize(
    ("asked", "granted"),
    [
        (None, 10.0),
        (Duration(seconds=30), 30.0),
        (Duration(seconds=2, nanos=500_000_000), 2.5),
        (Duration(), 1.0),
        (Duration(seconds=-5), 1.0),
        (Duration(seconds=10**9), 300.0),
    ],
)
async def test_a_lease_says_how_long_it_was_granted_for(
    registry: Serving, asked: Duration | None, granted: float
) -> None:
    answer = await registry.stub.Register(pb.RegisterRequest(instance=instance("a"), ttl=asked))
    assert answer.ttl.seconds + answer.ttl.nanos / 1e9 == granted


ADDRESS = 'must be "host:port", "[ipv6]:port" or "unix:path": '
PORT = "the port must be a number from 1 to 65535"
BRACKETS = "an IPv6 address with a port is written [::1]:50051"
SERVICE = 'must be a service\'s full name, such as "weft.user.v1.UserService"'
WILDCARD = "must be an address that other hosts can reach, not a wildcard"


@pytest.mark.parametrize(
    ("garbage", "violations"),
    [
        (
            pb.Instance(),
            {
                "instance.service": SERVICE,
                "instance.id": "must be set",
                "instance.address": ADDRESS + "'' is not a host name",
            },
        ),
        (instance("a", service="weft user"), {"instance.service": SERVICE}),
        (instance("a", service="/weft.User"), {"instance.service": SERVICE}),
        (instance("a", service="x" * 1025), {"instance.service": SERVICE}),
        (instance("a", address="10.0.0.1"), {"instance.address": ADDRESS + "missing port"}),
        (instance("a", address="10.0.0.1:0"), {"instance.address": ADDRESS + PORT}),
        (instance("a", address="10.0.0.1:65536"), {"instance.address": ADDRESS + PORT}),
        (instance("a", address="::1:50051"), {"instance.address": ADDRESS + BRACKETS}),
        (
            instance("a", address="http://users:80"),
            {"instance.address": ADDRESS + "'http://users:80' is not an IPv6 address"},
        ),
        (instance("a", address="a:1,b:2"), {"instance.address": ADDRESS + "'a:1,b:2' is not an IPv6 address"}),
        (instance("a", address="unix:"), {"instance.address": ADDRESS + PORT}),
        (instance("a", address="0.0.0.0:50051"), {"instance.address": WILDCARD}),
        (instance("a", address="[::]:50051"), {"instance.address": WILDCARD}),
        (
            pb.Instance(id="a", service=USER, address="10.0.0.1:1", weight=2**32 - 1),
            {"instance.weight": "must be from 1 to 1000, or 0 for 1"},
        ),
        (instance("x" * 1025), {"instance.id": "is longer than 1024"}),
        (instance("a", label="x" * 1025), {"instance.metadata": "is longer than 1024"}),
        (
            instance("a", **{str(n): "" for n in range(65)}),
            {"instance.metadata": "has more than 64 labels"},
        ),
    ],
)
async def test_garbage_is_refused_with_each_field_named(
    registry: Serving, garbage: pb.Instance, violations: dict[str, str]
) -> None:
    error = await failure(registry.stub.Register(pb.RegisterRequest(instance=garbage)))

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "; ".join(f"{field}: {what}" for field, what in violations.items())
    bad = error_details_pb2.BadRequest()
    assert rpc_status.from_call(error).details[0].Unpack(bad)
    assert {violation.field: violation.description for violation in bad.field_violations} == violations
    assert registry.book.revision == 0


@pytest.mark.parametrize(
    "address", ["localhost:1", "[::1]:50051", "[fe80::1%eth0]:1", "unix:/run/a", "unix-abstract:a"]
)
async def test_an_address_of_any_kind_may_be_registered(registry: Serving, address: str) -> None:
    await registry.register(instance("a", address=address))
    assert registry.book.snapshot(USER)[0].address == address


async def test_watching_needs_a_service(registry: Serving) -> None:
    error = await failure(registry.stub.Watch(pb.WatchRequest()).read())
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == f"service: {SERVICE}"


async def test_two_processes_with_one_id_are_logged(registry: Serving, caplog: pytest.LogCaptureFixture) -> None:
    await registry.register(instance("a", address="10.0.0.1:1"))
    await registry.register(instance("a", address="10.0.0.1:2"))
    assert f"{USER}: instance a moved from 10.0.0.1:1 to 10.0.0.1:2" in caplog.text


async def test_watchers_that_leave_are_forgotten(registry: Serving) -> None:
    watcher = Watcher(registry, "nobody.Serves")
    await watcher.next()
    watcher.call.cancel()
    await eventually(lambda: not registry.service._watchers and not registry.service._streams)


async def test_a_registry_that_was_stopped_for_a_while_ends_no_lease_for_that(registry: Serving) -> None:
    now = asyncio.get_running_loop().time()
    registry.book.register(instance("a"), ttl=10, now=now - 60)

    registry.service._expire(due=now - 50)
    assert registry.book.snapshot(USER) == (instance("a"),)
    assert registry.book.expire(now + 9) == []
    assert registry.book.expire(now + 11) == [instance("a")]


async def test_a_registry_that_stops_sends_its_clients_elsewhere_at_once(registry: Serving) -> None:
    watcher, keeper = Watcher(registry), registry.stub.KeepAlive()
    await watcher.next()
    await keeper.write(pb.KeepAliveRequest())
    await keeper.read()
    assert "streams=2" in repr(registry.service)

    registry.service.close()

    for call in (watcher.call, keeper, registry.stub.Watch(pb.WatchRequest(service=USER))):
        error = await failure(call.read())
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert error.details() == "the registry is shutting down"


CONFIG = '{"methodConfig": [{"name": [{}], "timeout": "1s"}]}'


def config_of(service: str, text: str) -> pb.SetServiceConfigRequest:
    return pb.SetServiceConfigRequest(service=service, service_config=text)


async def test_a_service_config_is_told_to_watchers_with_the_instances_and_when_it_changes(registry: Serving) -> None:
    await registry.stub.SetServiceConfig(config_of(USER, CONFIG))
    watcher = Watcher(registry)
    assert (await watcher.next()).snapshot.service_config == CONFIG

    await registry.stub.SetServiceConfig(config_of(ORDER, CONFIG))
    await registry.register(instance("a"))
    assert not (await watcher.next()).delta.HasField("service_config")

    await registry.stub.SetServiceConfig(config_of(USER, ""))
    step = await watcher.next()
    assert step.delta.HasField("service_config")
    assert step.delta.service_config == ""

    got = await registry.stub.GetServiceConfig(pb.GetServiceConfigRequest(service=ORDER))
    assert got.service_config == CONFIG
    got = await registry.stub.GetServiceConfig(pb.GetServiceConfigRequest(service=USER))
    assert got.service_config == ""


@pytest.mark.parametrize(
    ("text", "field", "what"),
    [
        ('{"methodConfig": [{"timeout": 3}]}', "service_config.methodConfig[0].timeout", "expected a duration"),
        ("{", "service_config", "not JSON: "),
        ("[]", "service_config", "the config: expected an object"),
        (" " * 262145, "service_config", "has 262145 bytes; the limit is 262144"),
    ],
)
async def test_a_bad_service_config_is_refused_with_the_fields_path_and_the_good_one_stays(
    registry: Serving, text: str, field: str, what: str
) -> None:
    await registry.stub.SetServiceConfig(config_of(USER, CONFIG))
    error = await failure(registry.stub.SetServiceConfig(config_of(USER, text)))

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert field in str(error.details())
    bad = error_details_pb2.BadRequest()
    rpc_status.from_call(error).details[0].Unpack(bad)
    assert [violation.field for violation in bad.field_violations] == [field]
    assert what in bad.field_violations[0].description

    got = await registry.stub.GetServiceConfig(pb.GetServiceConfigRequest(service=USER))
    assert got.service_config == CONFIG
