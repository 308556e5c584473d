"""SRV records, from a name server that speaks DNS on a port of its own."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncIterator, Iterable
from typing import cast

import dns.asyncresolver
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest

from mesh.discovery.resolver import Update
from mesh.discovery.srv import Record, SrvResolver, query
from mesh.discovery.target import resolver_for
from mesh.model import Endpoint

NAME = "_grpc._tcp.example.test"


class NameServer(asyncio.DatagramProtocol):
    """Answers for NAME with ``records``, empty when there are none; NXDOMAIN for other names."""

    def __init__(self, *records: str) -> None:
        self.records = records

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        question = dns.message.from_wire(data)
        answer = dns.message.make_response(question)
        (asked,) = question.question
        if asked.name.to_text(omit_final_dot=True) != NAME:
            answer.set_rcode(dns.rcode.NXDOMAIN)
        elif self.records == ("broken",):
            answer.set_rcode(dns.rcode.SERVFAIL)
        elif self.records and asked.rdtype == dns.rdatatype.SRV:
            answer.answer.append(dns.rrset.from_text(asked.name, 1, "IN", "SRV", *self.records))
        self.transport.sendto(answer.to_wire(), addr)


@contextlib.asynccontextmanager
async def serving(*records: str) -> AsyncIterator[dns.asyncresolver.Resolver]:
    """A name server; yields what asks it."""
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(lambda: NameServer(*records), local_addr=("127.0.0.1", 0))
    asking = dns.asyncresolver.Resolver(configure=False)
    asking.nameservers = ["127.0.0.1"]
    asking.port = transport.get_extra_info("sockname")[1]
    asking.search = []
    try:
        yield asking
    finally:
        transport.close()


ADDRESSES = {"a.example.test": ["10.0.0.1"], "b.example.test": ["10.0.0.2", "::2"]}


async def lookup(host: str, _port: int) -> Iterable[str]:
    if host not in ADDRESSES:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    return ADDRESSES[host]


async def resolved(asking: dns.asyncresolver.Resolver, name: str = NAME) -> Update:
    resolver = SrvResolver(name, rng=random.Random(1), lookup=lookup, query=lambda asked: query(asked, asking))
    async with contextlib.aclosing(resolver.updates()) as updates:
        return await anext(updates)


async def test_each_record_is_a_replica_with_its_port_weight_and_priority() -> None:
    async with serving("20 0 5001 a.example.test.", "10 60 5002 b.example.test.") as asking:
        assert (await resolved(asking)).endpoints == (
            Endpoint("10.0.0.1:5001", weight=1, priority=1),
            Endpoint("10.0.0.2:5002", weight=60, priority=0),
            Endpoint("[::2]:5002", weight=60, priority=0),
        )
        assert set(await query(NAME, asking)) == {
            Record(20, 0, 5001, "a.example.test"),
            Record(10, 60, 5002, "b.example.test"),
        }


async def test_hosts_that_are_not_found_leave_the_others() -> None:
    async with serving("0 0 5001 a.example.test.", "0 0 5002 gone.example.test.") as asking:
        assert (await resolved(asking)).endpoints == (Endpoint("10.0.0.1:5001"),)


async def test_when_no_host_is_found_what_was_known_holds() -> None:
    async with serving("0 0 5002 gone.example.test.") as asking:
        assert await resolved(asking) == Update(None, f"dns: {NAME}: Temporary failure in name resolution")


async def test_a_service_that_is_decidedly_not_there_has_no_endpoints() -> None:
    async with serving("0 0 0 .") as asking:
        assert (await resolved(asking)).endpoints == ()


@pytest.mark.parametrize("name", [NAME, "_grpc._tcp.other.test"])
async def test_a_name_without_records_fails_calls_at_once(name: str) -> None:
    async with serving() as asking:
        assert await resolved(asking, name) == Update(None, f"dns: {name}: no SRV records", final=True)


async def test_a_name_server_that_fails_is_asked_again() -> None:
    async with serving("broken") as asking:
        update = await resolved(asking)
        assert update.endpoints is None
        assert not update.final
        assert "SERVFAIL" in update.error


def test_a_name_of_a_service_and_protocol_means_srv_records() -> None:
    target, resolver = resolver_for(f"dns:///{NAME}")
    assert repr(resolver) == f"<SrvResolver {NAME}>"
    assert target.authority == "example.test", "whom certificates must name: who has the records"

    with pytest.raises(ValueError, match="SRV records have their own ports"):
        resolver_for(f"dns:///{NAME}:443")


def test_without_dnspython_the_target_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "dns.asyncresolver", None)
    with pytest.raises(ValueError, match="need dnspython; install weft"):
        resolver_for(f"dns:///{NAME}")
