"""The registry's book: what is known, for how long, and what a watcher who comes back is told."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mesh.registry.book import Book, Delta
from weft.mesh.v1 import registry_pb2 as pb

USER = "weft.user.v1.UserService"
ORDER = "weft.order.v1.OrderService"


def instance(id: str = "a", service: str = USER, address: str = "10.0.0.1:50051") -> pb.Instance:
    return pb.Instance(id=id, service=service, address=address)


def test_a_config_that_is_taken_back_from_a_service_that_has_none_leaves_nothing() -> None:
    book = Book("e")
    for number in range(3):
        book.configure(f"weft.Unknown{number}", "")
    assert not book._services
    assert book.revision == 0


def test_a_registered_instance_is_known_until_its_time_is_over() -> None:
    book = Book("e")
    book.register(instance(), ttl=10, now=100)

    assert book.next_expiry() == 110
    assert book.expire(now=109.9) == []
    assert book.snapshot(USER) == (instance(),)

    assert book.expire(now=110) == [instance()]
    assert book.snapshot(USER) == ()
    assert book.next_expiry() is None


def test_a_keep_alive_begins_the_time_anew() -> None:
    book = Book("e")
    lease = book.register(instance(), ttl=10, now=100)

    assert book.renew([lease], now=108) == []

    assert book.expire(now=117.9) == []
    assert book.next_expiry() == 118
    assert book.expire(now=118) == [instance()]


def test_leases_that_ended_or_never_were_are_answered_as_unknown() -> None:
    book = Book("e")
    expired = book.register(instance("a"), ttl=1, now=0)
    ended = book.register(instance("b"), ttl=10, now=0)
    alive = book.register(instance("c"), ttl=10, now=0)
    book.expire(now=1)
    book.deregister(ended)

    assert book.renew([expired, alive, ended, "of another life"], now=2) == [expired, ended, "of another life"]


def test_deregistering_ends_a_lease_at_once_and_only_once() -> None:
    book = Book("e")
    lease = book.register(instance(), ttl=10, now=0)

    assert book.deregister(lease) == instance()
    assert book.deregister(lease) is None
    assert book.snapshot(USER) == ()
    assert book.expire(now=10) == []


def test_an_id_registered_again_replaces_the_instance_and_its_lease() -> None:
    book = Book("e")
    old = book.register(instance(address="10.0.0.1:1"), ttl=10, now=0)
    new = book.register(instance(address="10.0.0.1:2"), ttl=10, now=5)

    assert old != new
    assert book.renew([old, new], now=6) == [old]
    assert book.snapshot(USER) == (instance(address="10.0.0.1:2"),)
    assert book.expire(now=10) == [], "the old lease's time says nothing about the new one"
    assert book.deregister(old) is None
    assert book.find(USER, "a") == instance(address="10.0.0.1:2")


def test_the_same_id_in_two_services_is_two_instances() -> None:
    book = Book("e")
    book.register(instance(service=USER), ttl=10, now=0)
    book.register(instance(service=ORDER), ttl=10, now=0)

    assert book.services() == [ORDER, USER]
    assert book.snapshot(USER) == (instance(service=USER),)
    assert book.find(ORDER, "a") == instance(service=ORDER)
    assert book.find(ORDER, "b") is None
    assert book.find("no.Such", "a") is None


def test_a_retried_registration_is_no_news() -> None:
    book = Book("e")
    book.register(instance(), ttl=10, now=0)
    seen = book.revision
    book.register(instance(), ttl=10, now=1)

    assert book.revision == seen
    assert book.changes(USER, seen) == Delta()


def test_a_registry_that_was_away_ends_no_lease_for_it() -> None:
    book = Book("e")
    book.register(instance(), ttl=10, now=0)

    book.renew_all(now=60)

    assert book.expire(now=60) == []
    assert book.expire(now=70) == [instance()]


def test_a_watcher_is_told_what_changed_since_it_last_heard() -> None:
    book = Book("e")
    book.register(instance("a"), ttl=10, now=0)
    lease = book.register(instance("b"), ttl=10, now=0)
    seen = book.revision
    book.register(instance("c"), ttl=10, now=0)
    book.register(instance("a", address="10.0.0.9:1"), ttl=10, now=0)
    book.deregister(lease)
    book.register(instance("o", service=ORDER), ttl=10, now=0)

    assert book.changes(USER, seen) == Delta((instance("a", address="10.0.0.9:1"), instance("c")), ("b",))
    assert book.changes(USER, book.revision) == Delta()
    assert not Delta()
    assert Delta(removed_ids=("b",))


def test_what_came_and_went_is_told_as_gone() -> None:
    book = Book("e")
    book.deregister(book.register(instance(), ttl=10, now=0))

    assert book.changes(USER, 0) == Delta(removed_ids=("a",))


def test_a_watcher_of_a_service_that_nobody_serves_is_up_to_date() -> None:
    assert Book("e", revision=7).changes(USER, 7) == Delta()


@pytest.mark.parametrize("revision", [-1, 6, 8])
def test_a_revision_that_the_book_cannot_tell_of_needs_a_snapshot(revision: int) -> None:
    assert Book("e", revision=7).changes(USER, revision) is None


def test_a_watcher_that_fell_behind_the_log_needs_a_snapshot() -> None:
    book = Book("e", log_size=3)
    for n in range(5):
        book.register(instance(str(n)), ttl=10, now=0)

    assert book.changes(USER, 1) is None
    assert book.changes(USER, 2) == Delta((instance("2"), instance("3"), instance("4")))


def test_the_churn_of_one_service_costs_the_watchers_of_a_quiet_one_nothing() -> None:
    book = Book("e", log_size=3)
    book.register(instance("q", service=ORDER), ttl=10, now=0)
    seen = book.revision
    for n in range(100):
        book.register(instance(address=f"10.0.0.1:{n + 1}"), ttl=10, now=0)

    assert book.changes(ORDER, seen) == Delta()


def test_a_service_that_left_the_book_is_not_told_of_from_a_time_that_was_forgotten() -> None:
    book = Book("e", log_size=2)
    book.deregister(book.register(instance("a", service=ORDER), ttl=10, now=0))
    seen_a = 1
    for n in range(2):
        book.register(instance(str(n)), ttl=10, now=0)

    assert book.changes(ORDER, seen_a) is None
    book.register(instance("b", service=ORDER), ttl=10, now=0)
    assert book.changes(ORDER, seen_a) is None, "it would never learn that a is gone"
    assert book.changes(ORDER, 3) is not None


def test_ids_registered_over_and_over_do_not_pile_up() -> None:
    book = Book("e", log_size=10)
    for n in range(10_000):
        book.register(instance(address=f"10.0.0.1:{n}"), ttl=300, now=n / 1000)
        book.deregister(book.register(instance(service=f"garbage.S{n}"), ttl=300, now=n / 1000))

    assert len(book._queue) <= 2 * 2 + 64
    assert len(book._services) <= 11
    assert len(book._log) == 10
    assert sum(len(service.log) for service in book._services.values()) == 10


def test_the_book_says_what_it_holds() -> None:
    book = Book("e")
    book.register(instance(), ttl=10, now=0)
    assert repr(book) == "<Book epoch=e revision=1 leases=1>"


IDS = st.sampled_from(["a", "b", "c"])
SERVICES = st.sampled_from([USER, ORDER])


def test_a_config_is_a_change_like_another() -> None:
    book = Book("e")
    book.register(instance(), ttl=10, now=0)
    book.configure(USER, "{}")

    assert book.config(USER) == "{}"
    assert book.config(ORDER) == ""
    assert book.changes(USER, since=0) == Delta(upserted=(instance(),), config="{}")
    assert book.changes(USER, since=1) == Delta(config="{}")

    book.configure(USER, "{}")
    assert book.revision == 2, "the same again is no change"

    book.configure(USER, "")
    assert book.config(USER) == ""
    assert book.changes(USER, since=2) == Delta(config="")
    assert book.changes(USER, since=2), "that it was taken back is news"


def test_a_config_outlives_its_services_instances_and_the_log() -> None:
    book = Book("e", log_size=2)
    book.configure(USER, "{}")
    for _ in range(3):
        book.deregister(book.register(instance(service=ORDER), ttl=10, now=0))

    assert book.config(USER) == "{}"
    assert book.services() == []

    book.configure(USER, "")
    for _ in range(3):
        book.deregister(book.register(instance(service=ORDER), ttl=10, now=0))
    assert USER not in book._services, "and a service of which nothing is known is forgotten"


class BookMachine(RuleBasedStateMachine):
    """Whatever happens, the book and its watchers agree with a plain dictionary that is searched from end to end."""

    def __init__(self) -> None:
        super().__init__()
        self.book = Book("e", log_size=4)
        self.now = 0.0
        # By service and id: the lease, the instance, when it ends.
        self.known: dict[tuple[str, str], tuple[str, pb.Instance, float, float]] = {}
        self.ended: list[str] = []
        # Watchers by name: what they have been told, and at which revision.
        self.told: dict[tuple[int, str], tuple[int, dict[str, pb.Instance]]] = {}

    @rule(service=SERVICES, id=IDS, port=st.integers(1, 3), ttl=st.sampled_from([1.0, 5.0, 30.0]))
    def register(self, service: str, id: str, port: int, ttl: float) -> None:
        registered = instance(id, service, f"h:{port}")
        lease = self.book.register(registered, ttl, self.now)
        if (service, id) in self.known:
            self.ended.append(self.known[service, id][0])
        self.known[service, id] = (lease, registered, self.now + ttl, ttl)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.known)))
        lease, registered, _, ttl = self.known[key]
        assert self.book.renew([lease, *self.ended], self.now) == self.ended
        self.known[key] = (lease, registered, self.now + ttl, ttl)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def deregister(self, data: st.DataObject) -> None:
        lease, registered, _, _ = self.known.pop(data.draw(st.sampled_from(sorted(self.known))))
        assert self.book.deregister(lease) == registered
        self.ended.append(lease)

    @rule(span=st.sampled_from([0.5, 1.0, 4.0, 30.0]))
    def time_passes(self, span: float) -> None:
        self.now += span
        due = {key for key, (_, _, ends, _) in self.known.items() if ends <= self.now}
        next_expiry = self.book.next_expiry()
        if due:
            assert next_expiry is not None
            assert next_expiry <= self.now
        assert {(i.service, i.id) for i in self.book.expire(self.now)} == due
        for key in due:
            self.ended.append(self.known.pop(key)[0])

    @rule()
    def away(self) -> None:
        self.book.renew_all(self.now)
        self.known = {key: (lease, i, self.now + ttl, ttl) for key, (lease, i, _, ttl) in self.known.items()}

    @rule(watcher=st.integers(0, 2), service=SERVICES)
    def watch(self, watcher: int, service: str) -> None:
        since, told = self.told.get((watcher, service), (0, {}))
        delta = self.book.changes(service, since)
        if delta is None:
            told = {i.id: i for i in self.book.snapshot(service)}
        else:
            told = told | {i.id: i for i in delta.upserted}
            told = {key: i for key, i in told.items() if key not in delta.removed_ids}
        self.told[watcher, service] = (self.book.revision, told)
        assert told == {key: i for (name, key), (_, i, _, _) in self.known.items() if name == service}

    @invariant()
    def agrees(self) -> None:
        for service in (USER, ORDER):
            expected = [i for (name, _), (_, i, _, _) in sorted(self.known.items()) if name == service]
            assert list(self.book.snapshot(service)) == expected
        assert self.book.services() == sorted({service for service, _ in self.known})


BookMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestBookAgainstADictionary = pytest.mark.slow(BookMachine.TestCase)
