"""What is believed of a registry's word: while it lives, after it was restarted, and when it talks nonsense."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from mesh.discovery.roster import Roster
from mesh.model import Endpoint, Locality
from weft.mesh.v1 import registry_pb2 as pb

SERVICE = "weft.user.v1.UserService"
HOLD = 30.0


def instance(id: str, address: str = "", service: str = SERVICE) -> pb.Instance:
    return pb.Instance(id=id, service=service, address=address or f"{id}:1")


def snapshot(epoch: str, revision: int, *ids: str) -> pb.WatchResponse:
    return of_instances(epoch, revision, [instance(each) for each in ids])


def of_instances(epoch: str, revision: int, instances: Sequence[pb.Instance]) -> pb.WatchResponse:
    return pb.WatchResponse(epoch=epoch, revision=revision, snapshot=pb.Snapshot(instances=instances))


def delta(epoch: str, revision: int, *ids: str, removed: Sequence[str] = ()) -> pb.WatchResponse:
    changes = pb.Delta(upserted=[instance(each) for each in ids], removed_ids=removed)
    return pb.WatchResponse(epoch=epoch, revision=revision, delta=changes)


def addresses(roster: Roster) -> str:
    return " ".join(endpoint.address.removesuffix(":1") for endpoint in roster.endpoints())


def roster_of(*steps: pb.WatchResponse) -> Roster:
    roster = Roster(SERVICE, HOLD)
    for step in steps:
        assert roster.apply(step, now=0) == ""
    return roster


def test_a_watch_begins_with_nothing_known() -> None:
    roster = Roster(SERVICE)
    assert roster.position == ("", 0)
    assert not roster.in_sync
    assert roster.endpoints() == ()
    assert repr(roster) == f"<Roster {SERVICE} at /0 known=0 held=0>"


def test_all_that_an_instance_says_of_itself_reaches_its_endpoint() -> None:
    told = pb.Instance(
        id="a",
        service=SERVICE,
        address="[::1]:50051",
        locality=pb.Locality(region="eu", zone="eu-1", sub_zone="rack 7"),
        weight=3,
        metadata={"version": "2"},
    )
    roster = roster_of(of_instances("e", 1, [told]))
    assert roster.endpoints() == (Endpoint("[::1]:50051", Locality("eu", "eu-1", "rack 7"), 3, 0, {"version": "2"}),)
    assert roster_of(snapshot("e", 1, "a")).endpoints()[0].weight == 1


def test_deltas_follow_a_snapshot() -> None:
    roster = roster_of(
        snapshot("e", 3, "b", "a"),
        delta("e", 5, "c", removed=["a"]),
        of_instances("e", 5, [instance("b"), instance("c", "elsewhere:1")]),
    )
    assert addresses(roster) == "b elsewhere"
    assert roster.position == ("e", 5)
    assert roster.in_sync


def test_a_living_registry_is_obeyed_when_it_takes_away_the_last_instance() -> None:
    roster = roster_of(snapshot("e", 1, "a"), delta("e", 2, removed=["a", "never heard of"]))
    assert addresses(roster) == ""
    assert roster.held_until is None


def test_a_living_registry_is_obeyed_when_its_snapshot_is_empty() -> None:
    assert addresses(roster_of(snapshot("e", 1, "a"), snapshot("e", 9))) == ""


def test_two_instances_with_one_address_are_one_endpoint() -> None:
    roster = roster_of(of_instances("e", 1, [instance("a", "x:1"), instance("b", "x:1")]))
    assert addresses(roster) == "x"


def test_an_empty_answer_from_a_restarted_registry_evicts_nobody_for_as_long_as_it_lasts() -> None:
    roster = roster_of(snapshot("old", 7, "a", "b"), snapshot("new", 0))

    assert roster.held_until is None
    roster.expire(now=1e9)
    assert addresses(roster) == "a b"
    assert roster.position == ("new", 0)
    assert repr(roster) == f"<Roster {SERVICE} at new/0 known=0 held=2>"


def test_the_first_to_register_again_does_not_evict_the_others() -> None:
    roster = roster_of(snapshot("old", 7, "a", "b"), snapshot("new", 0))
    roster.apply(delta("new", 1, "a"), now=100)

    assert addresses(roster) == "a b"
    assert roster.held_until == 130
    roster.expire(now=129.9)
    assert addresses(roster) == "a b"
    roster.expire(now=130)
    assert addresses(roster) == "a"
    assert roster.held_until is None


def test_nothing_is_held_once_all_have_registered_again() -> None:
    roster = roster_of(snapshot("old", 7, "a", "b"), snapshot("new", 1, "a"), delta("new", 2, "b"))
    assert roster.held_until is None
    assert addresses(roster) == "a b"


def test_an_instance_that_registers_again_elsewhere_is_no_longer_where_it_was() -> None:
    roster = roster_of(snapshot("old", 7, "a", "b"), of_instances("new", 1, [instance("a", "elsewhere:1")]))
    assert addresses(roster) == "b elsewhere"


def test_an_instance_that_registers_again_and_leaves_is_gone() -> None:
    roster = roster_of(snapshot("old", 7, "a", "b"), snapshot("new", 1, "a"), delta("new", 2, removed=["a"]))
    assert addresses(roster) == "b"
    roster.expire(now=HOLD)
    assert addresses(roster) == ""


def test_a_registry_can_give_no_instance_more_than_the_largest_weight_nor_an_address_that_is_none() -> None:
    roster = Roster(SERVICE)
    greedy = pb.Instance(id="a", service=SERVICE, address="a:1", weight=2**32 - 1)
    complaint = roster.apply(of_instances("e", 1, [greedy, instance("b")]), now=0)
    assert complaint == "instance 'a' with weight 4294967295, used as 1000"
    assert {endpoint.address: endpoint.weight for endpoint in roster.endpoints()} == {"a:1": 1000, "b:1": 1}

    for nonsense in ("http://a", "dns:///a:1", "a:1,b:1", "a", "a:0", "0.0.0.0:1", "xds:///a"):
        complaint = roster.apply(of_instances("e", 2, [instance("c", nonsense), instance("b")]), now=0)
        assert complaint == f"instance 'c' with address {nonsense!r}"
        assert addresses(roster) == "b"


def part(step: pb.WatchResponse) -> pb.WatchResponse:
    step.more = True
    return step


def test_a_snapshot_in_parts_takes_the_place_of_what_was_known_when_its_last_part_has_come() -> None:
    roster = roster_of(snapshot("e", 1, "a", "b"))
    for step in (part(snapshot("e", 0, "b")), part(delta("e", 0, "c", "d"))):
        assert roster.apply(step, now=0) == ""
        assert roster.in_sync
        assert not roster.complete
        assert addresses(roster) == "a b"

    assert roster.apply(delta("e", 7, "e", removed=["d"]), now=0) == ""
    assert roster.complete
    assert addresses(roster) == "b c e"
    assert roster.position == ("e", 7)


def test_a_watch_that_is_cut_between_the_parts_of_a_snapshot_goes_on_from_what_was_known_before() -> None:
    roster = roster_of(snapshot("e", 1, "a", "b"))
    roster.apply(part(snapshot("new", 0, "c")), now=0)
    roster.watch_ended()
    assert roster.complete
    assert roster.position == ("e", 1)
    assert roster.apply(delta("e", 2, "d"), now=0) == ""
    assert addresses(roster) == "a b d"

    # Also when the registry restarts: nobody is lost.
    roster.apply(part(snapshot("new", 0, "c")), now=0)
    roster.watch_ended()
    assert roster.apply(snapshot("newer", 1, "c"), now=0) == ""
    assert addresses(roster) == "a b c d"


def test_a_part_of_another_epoch_needs_a_new_watch() -> None:
    roster = roster_of(snapshot("e", 1, "a"))
    roster.apply(part(snapshot("new", 0, "c")), now=0)
    assert "doesn't follow" in roster.apply(delta("newer", 3, "d"), now=0)
    assert not roster.in_sync
    assert roster.complete
    assert addresses(roster) == "a"


@pytest.mark.slow
def test_a_registry_that_sends_ever_more_instances_fills_no_memory() -> None:
    def ids(first: int, count: int) -> list[str]:
        return [f"i{number}" for number in range(first, first + count)]

    roster = Roster(SERVICE)
    complaint = "more than 50000 instances; the rest is ignored"
    assert roster.apply(part(snapshot("e", 0, *ids(0, 50_000))), now=0) == ""
    assert roster.apply(part(delta("e", 0, *ids(50_000, 2))), now=0) == complaint
    assert roster.apply(delta("e", 1), now=0) == ""
    assert roster.apply(delta("e", 2, *ids(50_002, 2)), now=0) == complaint
    assert set(addresses(roster).split()) == set(ids(0, 50_000))


def test_the_registrys_own_word_on_an_address_counts_more_than_what_is_held() -> None:
    heavy = pb.Instance(id="new id", service=SERVICE, address="a:1", weight=9)
    roster = roster_of(snapshot("old", 7, "a"), of_instances("new", 1, [heavy]))
    assert roster.endpoints() == (Endpoint("a:1", weight=9),)


def test_a_registry_that_goes_away_again_gives_the_services_their_time_anew() -> None:
    roster = roster_of(snapshot("old", 7, "a", "b"), snapshot("new", 1, "a"))

    roster.watch_ended()
    roster.expire(now=1000)
    assert addresses(roster) == "a b", "nothing can be learned from a registry that is away"

    roster.apply(delta("new", 1), now=1000)
    assert roster.held_until == 1030


def test_a_registry_that_restarts_twice_loses_nobody() -> None:
    roster = roster_of(snapshot("one", 7, "a", "b", "c"), snapshot("two", 1, "a"), snapshot("three", 1, "b"))
    assert addresses(roster) == "a b c"


@pytest.mark.parametrize(
    ("garbage", "complaint"),
    [
        (pb.WatchResponse(), "a message without a snapshot or delta"),
        (pb.WatchResponse(epoch="e", revision=9), "a message without a snapshot or delta"),
        (snapshot("", 9, "b"), "a message without an epoch"),
        (of_instances("e", 9, [instance("b", " ")]), "instance 'b' with address ' '"),
        (of_instances("e", 9, [pb.Instance(id="b", service=SERVICE)]), "instance 'b' with address ''"),
        (of_instances("e", 9, [instance("", "b:1")]), "an instance at 'b:1' without an id"),
        (
            of_instances("new", 9, [instance("b", service="weft.order.v1.OrderService")]),
            f"instance 'b' of service 'weft.order.v1.OrderService', not '{SERVICE}'",
        ),
    ],
)
def test_garbage_is_complained_of_and_changes_nothing(garbage: pb.WatchResponse, complaint: str) -> None:
    roster = roster_of(snapshot("e", 1, "a"))
    assert roster.apply(garbage, now=0) == complaint
    assert addresses(roster) == "a"
    assert roster.position == ("e", 1)


def test_the_sound_instances_among_garbage_are_used() -> None:
    roster = roster_of(snapshot("e", 1, "a"))
    assert roster.apply(of_instances("e", 2, [instance("b"), instance("c", " ")]), now=0) == (
        "instance 'c' with address ' '"
    )
    assert addresses(roster) == "b"

    changes = pb.Delta(upserted=[instance("b", " "), instance("d")])
    assert roster.apply(pb.WatchResponse(epoch="e", revision=3, delta=changes), now=0)
    assert addresses(roster) == "b d"


@pytest.mark.parametrize("astray", [delta("other", 6, "b"), delta("e", 4, "b")])
def test_a_delta_that_does_not_follow_needs_a_new_watch(astray: pb.WatchResponse) -> None:
    roster = roster_of(snapshot("e", 5, "a"))

    assert "doesn't follow e/5" in roster.apply(astray, now=0)
    assert (roster.in_sync, roster.position) == (False, ("", 0))
    assert addresses(roster) == "a"
    assert roster.apply(delta("e", 6, "b"), now=0), "not even one that would have followed"

    assert roster.apply(snapshot("new", 1), now=0) == ""
    assert (roster.in_sync, roster.position) == (True, ("new", 1))
    assert addresses(roster) == "a", "what was known is held for a registry with another epoch, as ever"


IDS = st.sampled_from("abcd")
SETS = st.frozensets(IDS)


@pytest.mark.slow
@given(
    lives=st.lists(st.lists(SETS, min_size=1, max_size=4), min_size=1, max_size=4),
    spans=st.lists(st.sampled_from([1.0, HOLD / 2, HOLD]), min_size=20, max_size=20),
)
def test_no_instance_is_lost_but_by_the_word_of_a_registry_that_knew_it(
    lives: list[list[frozenset[str]]], spans: list[float]
) -> None:
    """Each life of the registry tells of some sets of instances one after the other, each a delta to the one before."""
    roster = Roster(SERVICE, HOLD)
    now = 0.0
    pauses = iter(spans)
    for number, sets in enumerate(lives):
        before = set(addresses(roster).split())
        told: frozenset[str] = frozenset()
        ever: set[str] = set()
        spoke_at: float | None = None
        for revision, ids in enumerate(sets):
            if revision == 0:
                step = snapshot(str(number), revision, *sorted(ids))
            else:
                step = delta(str(number), revision, *sorted(ids - told), removed=sorted(told - ids))
            assert roster.apply(step, now) == ""
            told = ids
            ever |= ids
            if spoke_at is None and ids:
                spoke_at = now
            roster.expire(now)
            held = set() if spoke_at is not None and now >= spoke_at + HOLD else before - ever
            assert set(addresses(roster).split()) == told | held
            now += next(pauses)


@given(st.binary(max_size=200))
def test_bytes_from_anywhere_never_raise(data: bytes) -> None:
    step = pb.WatchResponse()
    with contextlib.suppress(DecodeError):  # as far as it could be read
        step.ParseFromString(data)
    roster_of(snapshot("e", 1, "a")).apply(step, now=0)


CONFIG = '{"loadBalancingConfig": [{"round_robin": {}}]}'


def configured(epoch: str, revision: int, config: str) -> pb.WatchResponse:
    return pb.WatchResponse(epoch=epoch, revision=revision, snapshot=pb.Snapshot(service_config=config))


def test_the_services_config_is_what_the_registry_said_last() -> None:
    roster = roster_of(configured("e", 1, CONFIG), delta("e", 2, "a"))
    assert roster.service_config == CONFIG

    other = pb.WatchResponse(epoch="e", revision=3, delta=pb.Delta(service_config="{}"))
    assert roster.apply(other, now=0) == ""
    assert roster.service_config == "{}"

    taken_back = pb.WatchResponse(epoch="e", revision=4, delta=pb.Delta(service_config=""))
    assert roster.apply(taken_back, now=0) == ""
    assert roster.service_config == ""


def test_a_config_that_was_taken_back_while_the_watch_was_broken_off_is_gone() -> None:
    assert roster_of(configured("e", 1, CONFIG), configured("e", 9, "")).service_config == ""


def test_a_registry_that_was_restarted_and_has_no_config_takes_none_away() -> None:
    roster = roster_of(configured("e", 1, CONFIG), configured("new", 1, ""))
    assert roster.service_config == CONFIG
    assert roster.apply(configured("new", 2, "{}"), now=0) == ""
    assert roster.service_config == "{}"
