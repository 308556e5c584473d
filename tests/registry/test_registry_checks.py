"""Which instances the registry accepts, and from whom."""

from __future__ import annotations

import pytest

from mesh.registry import checks
from tests.registry.serving import instance
from weft.mesh.v1 import registry_pb2 as pb

HERE = ["ipv4:127.0.0.1:4711", "ipv6:[::1]:4711", "ipv6:%5B::1%5D:4711", "ipv6:[::ffff:127.0.0.1]:1", "unix:/run/r"]
ELSEWHERE = ["ipv4:203.0.113.7:4711", "ipv6:%5B2001:db8::7%5D:4711", "vsock:3:1", "unknown", ""]

ONLY_HERE = [
    "unix:/run/x.sock",
    "unix-abstract:x",
    "127.0.0.1:80",
    "127.8.8.8:80",
    "127.1:80",
    "0x7f000001:80",
    "2130706433:80",
    "[::1]:80",
    "[::ffff:127.0.0.1]:80",
    "localhost:80",
    "LOCALHOST.:80",
    "a.localhost:80",
    "169.254.169.254:80",
    "[::ffff:169.254.169.254]:80",
    "[fe80::1%eth0]:80",
    "[fe80::1]:80",
]
ANYWHERE = ["10.0.0.1:80", "192.168.1.1:80", "[fd00::2]:80", "[2001:db8::1]:80", "users.internal:80", "users:80"]


def violations(address: str, peer: str) -> dict[str, str]:
    return dict(checks.instance(instance("a", address=address), peer))


@pytest.mark.parametrize("peer", ELSEWHERE)
@pytest.mark.parametrize("address", ONLY_HERE)
def test_an_address_that_means_another_host_on_each_is_refused_from_other_hosts(address: str, peer: str) -> None:
    found = violations(address, peer)
    assert list(found) == ["instance.address"]
    assert "accepted only from the registry's own host" in found["instance.address"]
    assert "set MESH_ADVERTISE" in found["instance.address"]


@pytest.mark.parametrize("peer", HERE)
@pytest.mark.parametrize("address", ONLY_HERE + ANYWHERE)
def test_on_one_host_every_address_may_be_registered(address: str, peer: str) -> None:
    assert violations(address, peer) == {}


@pytest.mark.parametrize("peer", ELSEWHERE)
@pytest.mark.parametrize("address", ANYWHERE)
def test_an_address_that_others_can_reach_may_be_registered_from_anywhere(address: str, peer: str) -> None:
    assert violations(address, peer) == {}


@pytest.mark.parametrize(
    "address", ["0:80", "0.0.0.0:80", "[::]:80", "[::ffff:0.0.0.0]:80", "224.0.0.1:80", "[ff02::1]:80"]
)
def test_an_address_that_is_no_hosts_is_refused_from_everyone(address: str) -> None:
    assert violations(address, HERE[0]).keys() == {"instance.address"}


@pytest.mark.parametrize(
    ("weight", "accepted"), [(0, True), (1, True), (1000, True), (1001, False), (2**32 - 1, False)]
)
def test_weights_are_from_1_to_1000(weight: int, accepted: bool) -> None:
    told = pb.Instance(id="a", service="weft.A", address="10.0.0.1:80", weight=weight)
    expected = [] if accepted else [("instance.weight", "must be from 1 to 1000, or 0 for 1")]
    assert checks.instance(told, HERE[0]) == expected


@pytest.mark.parametrize("text", ["a\nINFO registered", "a\x1b[31m", "a\0b", "a\u2028b"])
def test_what_would_pass_for_something_else_in_a_log_is_refused(text: str) -> None:
    told = pb.Instance(id=text, service="weft.A", address="10.0.0.1:80", locality=pb.Locality(zone=text))
    why = "contains an unprintable character"
    assert checks.instance(told, HERE[0]) == [("instance.id", why), ("instance.locality.zone", why)]
