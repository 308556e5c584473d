"""Which targets mean what, and what is said of those that mean nothing."""

from __future__ import annotations

import pytest

from mesh.discovery.dns import DnsResolver
from mesh.discovery.registry import RegistryResolver
from mesh.discovery.static import StaticResolver
from mesh.discovery.target import Target, resolver_for

SERVICE = "weft.user.v1.UserService"


@pytest.fixture(autouse=True)
def no_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MESH_REGISTRY", raising=False)


def test_a_mesh_target_goes_to_the_registry_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_REGISTRY", "10.0.0.1:50050")
    target, resolver = resolver_for(f"mesh:///{SERVICE}")

    assert target == Target(f"mesh:///{SERVICE}", "mesh", health_service=SERVICE, authority=SERVICE)
    assert isinstance(resolver, RegistryResolver)
    assert repr(resolver) == f"<RegistryResolver {SERVICE} at 10.0.0.1:50050>"


def test_a_mesh_target_may_name_its_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_REGISTRY", "10.0.0.1:50050")
    target, resolver = resolver_for(f"mesh://[::1]:50050/{SERVICE}")

    assert target.health_service == SERVICE
    assert repr(resolver) == f"<RegistryResolver {SERVICE} at [::1]:50050>"


@pytest.mark.parametrize(
    "registry", ["registry:50050", "dns:///registry:50050", "ipv4:10.0.0.1:1,10.0.0.2:1", "unix:/r"]
)
def test_the_registry_may_be_any_target_of_grpcs(monkeypatch: pytest.MonkeyPatch, registry: str) -> None:
    monkeypatch.setenv("MESH_REGISTRY", registry)
    assert repr(resolver_for(f"mesh:///{SERVICE}")[1]) == f"<RegistryResolver {SERVICE} at {registry}>"


@pytest.mark.parametrize(
    ("target", "addresses"),
    [
        ("static:///10.0.0.1:1", "10.0.0.1:1"),
        ("static:///b:2, a:1,b:2", "b:2,a:1"),
        ("static:///[::1]:50051,localhost:50052", "[::1]:50051,localhost:50052"),
        ("static:///unix:/run/a.sock,unix:b,unix-abstract:c", "unix:/run/a.sock,unix:b,unix-abstract:c"),
        ("STATIC:///a:1,", "a:1"),
    ],
)
def test_a_static_target_lists_its_endpoints(target: str, addresses: str) -> None:
    parsed, resolver = resolver_for(target)

    assert parsed == Target(target, "static")
    assert isinstance(resolver, StaticResolver)
    assert repr(resolver) == f"<StaticResolver {addresses}>"


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("dns:///users.internal:50051", "users.internal:50051"),
        ("dns:///users.internal", "users.internal:443"),
        ("dns:///[::1]:50051", "[::1]:50051"),
        ("dns:///[::1]", "[::1]:443"),
        ("dns:///fe80::1", "[fe80::1]:443"),
        ("dns:///%5B::1%5D:50051", "[::1]:50051"),
    ],
)
def test_a_dns_target_is_polled_by_the_mesh(target: str, name: str) -> None:
    parsed, resolver = resolver_for(target)

    assert (parsed.scheme, parsed.health_service) == ("dns", None)
    assert isinstance(resolver, DnsResolver)
    assert repr(resolver) == f"<DnsResolver {name}>"


def test_a_dns_targets_certificate_names_the_target() -> None:
    assert resolver_for("dns:///users.internal:50051")[0].authority == "users.internal:50051"


@pytest.mark.parametrize(
    "target",
    [
        "localhost:50051",
        "10.0.0.1:50051",
        "[::1]:50051",
        "users.internal",
        "mesh:50051",
        "static:80",
        "dns:users.internal:50051",
        "dns://8.8.8.8/users.internal:50051",
        "ipv4:10.0.0.1:50051,10.0.0.2:50051",
        "ipv6:[::1]:50051",
        "unix:/run/users.sock",
        "unix:///run/users.sock",
        "unix-abstract:users",
        "vsock:2:50051",
        "xds:///users",
    ],
)
def test_every_other_target_is_grpcs_own(target: str) -> None:
    assert resolver_for(target) == (Target(target), None)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("http://users:80", "unknown scheme 'http'; known: mesh, static, dns, unix,"),
        ("consul:///users", "unknown scheme 'consul'"),
        (
            f"mesh:///{SERVICE}",
            r"no registry; set MESH_REGISTRY=host:port, or write mesh://host:port/weft\.user\.v1\.UserService",
        ),
        ("mesh:///", "name a service"),
        ("mesh://registry:50050", "name a service"),
        (f"mesh://{SERVICE}", f"write three slashes, mesh:///{SERVICE}"),
        (f"mesh://{SERVICE}/", f"write three slashes, mesh:///{SERVICE}"),
        ("mesh://registry:50050/a/b", "name a service"),
        (f"mesh://registry/{SERVICE}", "must be host:port, not 'registry'"),
        (f"mesh://registry:0/{SERVICE}", "must be host:port, not 'registry:0'"),
        (f"mesh:{SERVICE}", "write mesh:///"),
        ("static:a:1,b:2", "write static:///"),
        ("static:///", "no addresses; write static"),
        ("static:///,", "no addresses; write static"),
        ("static://a:1", "three slashes, static:///a:1"),
        ("static:///a:1,b", "'b' is not host:port"),
        ("static:///a:65536", "'a:65536' is not host:port"),
        ("static:///::1:50051", "'::1:50051' is not host:port"),
        ("dns:///", "is not host or host:port"),
        ("dns:///users:http", "is not host or host:port"),
        ("dns:///users:0", "is not host or host:port"),
        ("dns:///a/b:1", "is not host or host:port"),
        ("dns:///[::1", "is not host or host:port"),
        ("dns:///[::1]50051", "is not host or host:port"),
    ],
)
def test_a_target_that_means_nothing_is_refused_when_the_channel_is_made(target: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as raised:
        resolver_for(target)
    assert repr(target) in str(raised.value)


def test_a_registry_variable_that_grpc_could_not_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_REGISTRY", "http://registry:50050")
    with pytest.raises(ValueError, match="the registry must be host:port, not 'http://registry:50050'"):
        resolver_for(f"mesh:///{SERVICE}")
