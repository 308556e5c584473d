"""The registry's limits: what one peer sends, however much and however odd, is bounded and harms nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from mesh.discovery.roster import Roster
from mesh.registry.book import Book
from tests.registry.serving import BOUND, ORDER, USER, Serving, eventually, instance, serving
from weft.mesh.v1 import registry_pb2 as pb
from weft.mesh.v1 import registry_pb2_grpc as pb_grpc

CONFIG = '{"methodConfig": [{"name": [{}], "timeout": "1s"}]}'


@pytest.fixture
async def registry() -> AsyncIterator[Serving]:
    async with serving() as registry:
        yield registry


async def refused(call: grpc.aio.UnaryUnaryCall[Any, Any]) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return f"{raised.value.code().name}: {raised.value.details()}"


def unknown(number: int, size: int) -> bytes:
    """A field that no message has, as a newer or hostile peer may send it."""
    tag = number << 3 | 2
    return bytes([tag & 0x7F | 0x80, tag >> 7]) + pb.Locality(region="x" * size).SerializeToString()[1:]


async def test_unknown_fields_are_neither_kept_nor_relayed(registry: Serving) -> None:
    plain = instance("a", label="x")
    parts = (plain, pb.Locality(region="r"))
    encoded = plain.SerializeToString() + unknown(99, 100_000)
    # Also in messages within.
    where = pb.Locality.FromString(parts[1].SerializeToString() + unknown(98, 100_000))
    told = pb.Instance.FromString(encoded)
    told.locality.CopyFrom(where)
    assert told.ByteSize() > 200_000

    await registry.register(told)

    expected = instance("a", label="x")
    expected.locality.region = "r"
    (kept,) = registry.book.snapshot(USER)
    assert kept.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)
    step = await registry.stub.Watch(pb.WatchRequest(service=USER), timeout=BOUND).read()
    assert isinstance(step, pb.WatchResponse)
    assert step.ByteSize() < 1_000


MEBIBYTE = 1024 * 1024
LABELS = {f"{n:03}": "x" * 1024 for n in range(64)}
"""As many as an instance may have, at full length: of such instances 126 fit into a service's 8 MiB."""


async def test_an_instance_with_all_labels_at_full_length_is_registered(registry: Serving) -> None:
    await registry.register(instance("a", **LABELS))

    wide = instance("b", **dict.fromkeys(LABELS, "😀" * 1024))
    said = await refused(registry.stub.Register(pb.RegisterRequest(instance=wide)))
    assert said == f"INVALID_ARGUMENT: instance: has {wide.ByteSize()} bytes; the limit is 131072"


async def test_a_service_that_is_full_refuses_instances_and_the_others_go_on(registry: Serving) -> None:
    lease = ""
    for n in range(126):
        lease = await registry.register(instance(f"{n:03}", **LABELS))

    said = await refused(registry.stub.Register(pb.RegisterRequest(instance=instance("126", **LABELS))))
    assert said == f"RESOURCE_EXHAUSTED: the instances of {USER} would exceed 8388608 bytes, the limit for a service"
    await registry.register(instance("126", ORDER, **LABELS))
    await registry.register(instance("125", **dict.fromkeys(LABELS, "y" * 1024)))  # in place of itself
    await registry.register(instance("small"))

    await registry.stub.Deregister(pb.DeregisterRequest(lease_id=lease))
    assert len(registry.book.snapshot(USER)) == 127, "its lease was replaced"


@pytest.mark.slow
def test_a_book_has_room_for_100_000_instances_and_again_when_some_end() -> None:
    book = Book("e")
    leases = [book.register(instance(str(n)), 10, now=0) for n in range(100_000)]
    assert book.refusal(instance("one more")) == "the registry already has 100000 instances, its limit"
    assert book.refusal(instance("2", label="more")) == ""

    book.deregister(leases[0])
    assert book.refusal(instance("one more")) == ""


@pytest.mark.slow
def test_a_book_has_room_for_64_megabytes_and_again_when_some_end() -> None:
    book = Book("e")
    large = "x" * (8 * MEBIBYTE - 100)
    for n in range(8):
        assert book.refusal(instance("a", f"test.S{n}", label=large)) == ""
        book.register(instance("a", f"test.S{n}", label=large), 10, now=n)
    assert book.refusal(instance("b", ORDER, label="x" * 1_000)) == (
        "the instances of all services would exceed 67108864 bytes, the registry's limit"
    )
    assert len(book.expire(now=10)) == 1
    assert book.refusal(instance("b", ORDER, label=large)) == ""
    assert len(book.expire(now=17)) == 7
    assert book._size == 0
    assert all(service.size == 0 for service in book._services.values())


async def test_the_number_and_the_bytes_of_service_configs_are_limited(registry: Serving) -> None:
    def configure(service: str, text: str = CONFIG) -> grpc.aio.UnaryUnaryCall[Any, Any]:
        return registry.stub.SetServiceConfig(pb.SetServiceConfigRequest(service=service, service_config=text))

    for n in range(998):
        registry.book.configure(f"test.S{n}", CONFIG)
    await configure("weft.A")
    await configure("weft.B")
    assert await refused(configure("weft.C")) == (
        "RESOURCE_EXHAUSTED: the registry already has configs for 1000 services, its limit"
    )
    large = CONFIG.ljust(MEBIBYTE // 4)
    for n in range(63):
        registry.book.configure(f"test.S{n}", large)
    assert await refused(configure("weft.B", large)) == (
        "RESOURCE_EXHAUSTED: all service configs would exceed 16777216 bytes, the registry's limit"
    )
    assert registry.book.config("weft.B") == CONFIG

    await configure("weft.A", "")
    await configure("weft.C", CONFIG.ljust(100_000))
    await configure("weft.C", CONFIG)
    assert registry.book.config("weft.A") == ""
    assert registry.book.config("weft.C") == CONFIG


async def watched(registry: Serving, epoch: str = "", revision: int = 0) -> list[pb.WatchResponse]:
    """The steps of a watch until it is complete."""
    call = registry.stub.Watch(pb.WatchRequest(service=USER, epoch=epoch, revision=revision), timeout=BOUND)
    steps: list[pb.WatchResponse] = []
    while not steps or steps[-1].more:
        step = await call.read()
        assert isinstance(step, pb.WatchResponse)
        steps.append(step)
    call.cancel()
    return steps


def merged(steps: list[pb.WatchResponse]) -> list[str]:
    roster = Roster(USER)
    for step in steps:
        assert roster.apply(step, now=0) == ""
        assert roster.complete == (not step.more)
    return [endpoint.address for endpoint in roster.endpoints()]


async def test_a_service_of_many_megabytes_can_be_watched_by_clients_with_grpcs_default_limit(
    registry: Serving,
) -> None:
    labels = {f"{n:03}": "x" * 1000 for n in range(64)}
    expected = [f"10.0.0.{n}:1" for n in range(1, 71)]
    for address in expected:
        await registry.register(instance(address, address=address, **labels))
    assert sum(each.ByteSize() for each in registry.book.snapshot(USER)) > 4 << 20

    steps = await watched(registry)

    assert merged(steps) == sorted(expected)
    assert max(step.ByteSize() for step in steps) < 200_000
    # Who was cut off between parts begins again; who has all resumes.
    assert [step.revision for step in steps] == [0] * (len(steps) - 1) + [70]
    assert merged(await watched(registry, steps[0].epoch, steps[0].revision)) == sorted(expected)
    (last,) = await watched(registry, steps[-1].epoch, steps[-1].revision)
    assert not last.delta.upserted


async def test_the_parts_of_a_snapshot_are_made_once_for_all_watchers_until_the_service_changes(
    registry: Serving,
) -> None:
    for n in range(40):
        await registry.register(instance(f"{n:02}", **{f"{n:03}": "x" * 1000 for n in range(10)}))
    # A watcher that stays, so that the parts do.
    staying = registry.stub.Watch(pb.WatchRequest(service=USER))
    first = await staying.read()
    await watched(registry)
    parts = dict(registry.service._snapshots.parts[USER])
    assert len(parts) > 3
    await watched(registry)
    again = registry.service._snapshots.parts[USER]
    assert all(again[key] is part for key, part in parts.items())
    assert len(again) == len(parts)

    await registry.register(instance("0"))
    assert not registry.service._snapshots.parts
    assert isinstance(first, pb.WatchResponse)
    staying.cancel()
    await eventually(lambda: not registry.service._watchers)
    assert not registry.service._snapshots.parts, "nobody watches"


@pytest.mark.slow
async def test_what_changes_between_the_parts_of_a_snapshot_is_told_after_them(registry: Serving) -> None:
    label = "x" * 1000
    leases = [await registry.register(instance(f"{n:04}", address=f"a{n:04}:1", label=label)) for n in range(3_000)]
    options = [("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(registry.address, options=options) as channel:
        call = pb_grpc.RegistryStub(channel).Watch(pb.WatchRequest(service=USER), timeout=BOUND)
        first = await call.read()
        assert isinstance(first, pb.WatchResponse)
        # It doesn't read, and so the rest waits.
        for n in (0, 1, 2_998, 2_999):
            await registry.stub.Deregister(pb.DeregisterRequest(lease_id=leases[n]))
        await registry.register(instance("0002", address="moved:1"))
        await registry.register(instance("0000a", address="new:1"))
        steps = [first]
        while steps[-1].more or steps[-1].revision < registry.book.revision:
            step = await call.read()
            assert isinstance(step, pb.WatchResponse)
            steps.append(step)
    expected = [f"a{n:04}:1" for n in range(3, 2_998)] + ["moved:1", "new:1"]
    assert merged(steps) == sorted(expected)


@pytest.mark.slow
async def test_a_watcher_that_does_not_read_is_dropped_and_says_why() -> None:
    async with serving(send_timeout=0.1) as registry:
        for n in range(40):
            await registry.register(instance(f"{n}", **{f"{n:03}": "x" * 1000 for n in range(10)}))
        # A window that doesn't grow with what the network could carry, so that it is soon full.
        options = [("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(registry.address, options=options) as channel:
            call = pb_grpc.RegistryStub(channel).Watch(pb.WatchRequest(service=USER), timeout=BOUND)
            await eventually(lambda: USER in registry.service._watchers)
            await eventually(lambda: not registry.service._watchers and not registry.service._streams)
            assert not registry.service._snapshots.parts
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                [step async for step in call]
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert raised.value.details() == "the watcher read nothing for 0.1 s; watch again"
        assert len(merged(await watched(registry))) == 1


async def test_a_keep_alive_with_too_many_ids_is_refused_whole(registry: Serving) -> None:
    lease = await registry.register(instance("a"))
    for count, code in ((1000, None), (1001, grpc.StatusCode.INVALID_ARGUMENT)):
        stream = registry.stub.KeepAlive(timeout=BOUND)
        await stream.write(pb.KeepAliveRequest(lease_ids=[lease] * count))
        if code is None:
            answer = await stream.read()
            assert isinstance(answer, pb.KeepAliveResponse)
            assert not answer.unknown_lease_ids
            stream.cancel()
        else:
            assert await stream.code() is code
            assert await stream.details() == "lease_ids: has 1001 ids; the limit is 1000"


async def listed(registry: Serving, service: str = "", page_size: int = 0) -> list[list[str]]:
    """The ids of all instances, page by page."""
    pages: list[list[str]] = []
    token = ""
    while token or not pages:
        request = pb.ListInstancesRequest(service=service, page_size=page_size, page_token=token)
        answer = await registry.stub.ListInstances(request, timeout=BOUND)
        pages.append([f"{each.service.rpartition('.')[2][0]}{each.id}" for each in answer.instances])
        token = answer.next_page_token
    return pages


async def test_instances_are_listed_in_pages(registry: Serving) -> None:
    for each in (*(instance(f"{n}", ORDER) for n in range(3)), *(instance(f"{n}") for n in range(4))):
        await registry.register(each)
    everything = ["O0", "O1", "O2", "U0", "U1", "U2", "U3"]

    assert await listed(registry) == [everything]
    assert await listed(registry, page_size=7) == [everything]
    assert await listed(registry, page_size=2_000_000_000) == [everything]
    assert await listed(registry, page_size=3) == [["O0", "O1", "O2"], ["U0", "U1", "U2"], ["U3"]]
    assert await listed(registry, page_size=4) == [["O0", "O1", "O2", "U0"], ["U1", "U2", "U3"]]
    assert await listed(registry, USER, page_size=2) == [["U0", "U1"], ["U2", "U3"]]
    assert await listed(registry, "no.Such", page_size=2) == [[]]


@pytest.mark.slow
async def test_a_page_has_no_more_than_a_thousand_instances_or_a_megabyte(registry: Serving) -> None:
    for n in range(2_100):
        registry.book.register(instance(f"{n:04}"), 300, asyncio.get_running_loop().time())
    assert [len(page) for page in await listed(registry)] == [1_000, 1_000, 100]

    labels = {f"{n:02}": "x" * 1000 for n in range(64)}
    for n in range(40):
        await registry.register(instance(f"{n:04}", ORDER, **labels))
    pages = await listed(registry, ORDER)
    assert [len(page) for page in pages] == [16, 16, 8]


async def test_an_instance_that_goes_between_two_pages_leaves_the_rest(registry: Serving) -> None:
    leases = [await registry.register(instance(f"{n}")) for n in range(4)]
    first = await registry.stub.ListInstances(pb.ListInstancesRequest(page_size=2))
    await registry.stub.Deregister(pb.DeregisterRequest(lease_id=leases[1]))
    rest = await registry.stub.ListInstances(pb.ListInstancesRequest(page_token=first.next_page_token))
    assert [each.id for each in rest.instances] == ["2", "3"]


@pytest.mark.parametrize(
    "token", ["x", "====", "\ud7ff", "0001-01-01T00:00:00+23:59", "AAAA", "_w==", "YQ==", "A" * 100_000]
)
async def test_a_page_token_that_the_registry_did_not_give_is_refused(registry: Serving, token: str) -> None:
    said = await refused(registry.stub.ListInstances(pb.ListInstancesRequest(page_token=token)))
    assert said == "INVALID_ARGUMENT: page_token: must be the next_page_token of a page of the same service"


async def test_a_page_is_asked_for_as_it_was_begun(registry: Serving) -> None:
    for n in range(2):
        await registry.register(instance(f"{n}"))
    token = (await registry.stub.ListInstances(pb.ListInstancesRequest(page_size=1))).next_page_token
    said = await refused(registry.stub.ListInstances(pb.ListInstancesRequest(service=ORDER, page_token=token)))
    assert said.startswith("INVALID_ARGUMENT: page_token: ")
    said = await refused(registry.stub.ListInstances(pb.ListInstancesRequest(page_size=-1)))
    assert said == "INVALID_ARGUMENT: page_size: must not be negative"
