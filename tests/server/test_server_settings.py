"""A served process's settings come from its environment, and a wrong one is refused in words that help."""

import pytest

from mesh.policy.server.admission import Mode
from mesh.server.lifecycle import instances
from mesh.server.listening import advertised_address
from mesh.server.settings import ServerSettings


class TestFromEnvironment:
    def test_an_empty_environment_gives_the_defaults(self) -> None:
        assert ServerSettings.from_env({}) == ServerSettings()
        assert ServerSettings.from_env({"MESH_LISTEN": "", "MESH_GRACE": ""}) == ServerSettings()

    def test_every_variable_is_read(self) -> None:
        settings = ServerSettings.from_env(
            {
                "MESH_LISTEN": "0.0.0.0:0",
                "MESH_ADVERTISE": "shop.example:443",
                "MESH_REGISTRY": "[::1]:50050",
                "MESH_INSTANCE_ID": "user-1",
                "MESH_REGION": "eu",
                "MESH_ZONE": "eu-a",
                "MESH_SUB_ZONE": "rack-3",
                "MESH_WEIGHT": "7",
                "MESH_METADATA": "version=2, canary = yes",
                "MESH_LEASE_TTL": "3.5",
                "MESH_DRAIN_WAIT": "0",
                "MESH_DEREGISTER_TIMEOUT": "2",
                "MESH_GRACE": "30",
                "MESH_REFLECTION": "On",
                "MESH_MAX_RECEIVE_BYTES": "1000",
                "MESH_MAX_SEND_BYTES": "-1",
                "MESH_KEEPALIVE_TIME": "20",
                "MESH_KEEPALIVE_TIMEOUT": "5",
                "MESH_MIN_PING_INTERVAL": "0.5",
                "MESH_MAX_WORKERS": "4",
            }
        )
        assert settings == ServerSettings(
            listen="0.0.0.0:0",
            advertise="shop.example:443",
            registry="[::1]:50050",
            instance_id="user-1",
            region="eu",
            zone="eu-a",
            sub_zone="rack-3",
            weight=7,
            metadata={"version": "2", "canary": "yes"},
            lease_ttl=3.5,
            drain_wait=0,
            deregister_timeout=2,
            grace=30,
            reflection=True,
            max_receive_bytes=1000,
            max_send_bytes=-1,
            keepalive_time=20,
            keepalive_timeout=5,
            min_ping_interval=0.5,
            max_workers=4,
        )

    @pytest.mark.parametrize(
        ("variable", "value", "accepted"),
        [
            ("MESH_LISTEN", "50051", "host:port"),
            ("MESH_LISTEN", "localhost:", "host:port"),
            ("MESH_LISTEN", "localhost:70000", "host:port"),
            ("MESH_ADVERTISE", "shop:http", "host:port, or a host alone"),
            ("MESH_REGISTRY", "registry", "host:port"),
            ("MESH_GRACE", "10s", "seconds from 0 to 3600"),
            ("MESH_GRACE", "-1", "seconds from 0 to 3600"),
            ("MESH_GRACE", "nan", "seconds from 0 to 3600"),
            ("MESH_LEASE_TTL", "0", "seconds from 1 to 300"),
            ("MESH_MAX_WORKERS", "1.5", "a whole number from 1"),
            ("MESH_WEIGHT", "0", "a whole number from 1 to 1000"),
            ("MESH_WEIGHT", "1001", "a whole number from 1 to 1000"),
            ("MESH_REFLECTION", "maybe", "1, true, yes, on, or 0, false, no, off"),
            ("MESH_METADATA", "version", "comma-separated key=value pairs"),
        ],
    )
    def test_a_wrong_value_is_refused_with_what_is_accepted(self, variable: str, value: str, accepted: str) -> None:
        with pytest.raises(ValueError, match="expected") as caught:
            ServerSettings.from_env({variable: value})
        assert str(caught.value).startswith(f"{variable}={value!r}: expected {accepted}")

    @pytest.mark.parametrize("variable", ["MESH_MAX_WORKERS", "MESH_GRACE"])
    def test_a_number_of_4301_digits_is_refused_in_few_words(self, variable: str) -> None:
        with pytest.raises(ValueError, match=r"expected (a whole number|seconds) from ") as caught:
            ServerSettings.from_env({variable: "0" * 4300 + "1"})
        assert len(str(caught.value)) < 300


class TestOptions:
    def test_a_vanished_client_is_noticed_within_5_seconds(self) -> None:
        options = dict(ServerSettings().server_options())
        # core needs all three: without the last, its own default of a minute holds
        noticed = int(options["grpc.keepalive_time_ms"]) + int(options["grpc.keepalive_timeout_ms"])
        assert noticed <= 5000
        assert options["grpc.http2.ping_timeout_ms"] == options["grpc.keepalive_timeout_ms"]

    def test_one_s_own_options_win(self) -> None:
        options = ServerSettings(options=[("grpc.so_reuseport", 1)]).server_options()
        assert [value for name, value in options if name == "grpc.so_reuseport"] == [1], "core takes the first"


class TestAdvertised:
    @pytest.mark.parametrize(
        ("listen", "advertise", "address"),
        [
            ("127.0.0.1:0", "", "127.0.0.1:4711"),
            ("127.0.0.1:0", "shop", "shop:4711"),
            ("127.0.0.1:0", "shop:0", "shop:4711"),
            ("0.0.0.0:4711", "shop:443", "shop:443"),
            ("[::1]:4711", "", "[::1]:4711"),
            ("unix:/run/shop", "", "unix:/run/shop"),
            # all interfaces: the one that leads to the registry
            ("0.0.0.0:0", "", "127.0.0.1:4711"),
        ],
    )
    def test_clients_are_given_an_address_that_they_can_call(self, listen: str, advertise: str, address: str) -> None:
        settings = ServerSettings(listen=listen, advertise=advertise, registry="127.0.0.1:50050")
        assert advertised_address(settings, 4711) == address

    def test_an_instance_without_an_id_is_known_by_its_address(self) -> None:
        # So one that was killed and started again there replaces itself.
        (one,) = instances(["a.B"], ServerSettings(zone="z", weight=3, metadata={"v": "1"}), "h:1")
        assert (one.id, one.service, one.address, one.locality.zone, one.weight, one.metadata["v"]) == (
            "h:1",
            "a.B",
            "h:1",
            "z",
            3,
            "1",
        )


def test_a_mode_may_be_given_by_name_and_nothing_else() -> None:
    settings = ServerSettings(overload="dry-run", late="off")  # type: ignore[arg-type]
    assert (settings.overload, settings.late) == (Mode.DRY_RUN, Mode.OFF)
    with pytest.raises(ValueError, match="overload: expected on, dry-run or off, got 'bogus'"):
        ServerSettings(overload="bogus")  # type: ignore[arg-type]
