"""Who gets in: at once while there is room, else in order of importance, and the least important are shed first."""

import contextlib
from typing import Any

import pytest

from mesh.policy.admission import (
    BY_NAME,
    CODES,
    Admission,
    AdmissionConfig,
    CoDel,
    Criticality,
    Mode,
    Reason,
    Ticket,
)
from mesh.policy.limiter import Ending, Latency

PLUS, CRITICAL, SHED_PLUS, SHED = Criticality


class House:
    """An admission with a clock, whose callers are told apart by name."""

    def __init__(self, **config: Any) -> None:
        self.admission = Admission(
            AdmissionConfig(**{"initial": 10, "least": 10, "most": 10, **config}), contextlib.nullcontext()
        )
        self.now = 100.0

    def enter(self, count: int = 1, criticality: Criticality = CRITICAL) -> list[bool]:
        return [self.admission.enter(criticality) for _ in range(count)]

    def queue(self, criticality: Criticality = CRITICAL) -> Ticket:
        ticket = Ticket(criticality, self.now, lambda: None)
        self.admission.wait(ticket, self.now)
        return ticket

    def leave(self) -> list[Ticket]:
        self.admission.leave(Latency(), 0.01, Ending.OK, self.now)
        return self.admission.dispatch(self.now)


def full(**config: Any) -> House:
    house = House(**config)
    assert all(house.enter(10))
    return house


class TestEntering:
    def test_a_call_runs_at_once_while_there_is_room(self) -> None:
        house = House()
        assert house.enter(11) == [True] * 10 + [False]
        assert repr(house.admission) == "<Admission 10/10 in flight, 0 waiting>"

    def test_the_sheddable_leave_room_for_the_rest(self) -> None:
        house = House()
        assert house.enter(9, SHED) == [True] * 8 + [False]
        assert house.enter(2, SHED_PLUS) == [True, False]
        assert house.enter(2, CRITICAL) == [True, False]

    def test_nobody_passes_those_who_wait(self) -> None:
        house = full()
        house.queue()
        house.admission.leave(Latency(), 0.01, Ending.OK, house.now)
        assert house.enter() == [False]

    def test_a_permit_that_comes_free_goes_to_the_most_important_and_the_oldest_of_them(self) -> None:
        house = full()
        waiting = [house.queue(criticality) for criticality in (SHED, CRITICAL, CRITICAL, PLUS)]
        assert house.leave() == [waiting[3]]
        assert house.leave() == [waiting[1]]
        assert house.leave() == [waiting[2]]
        assert waiting[3].admitted
        assert house.leave() == []  # only eight of the ten permits are for the sheddable
        house.leave()
        assert house.leave() == [waiting[0]]

    def test_as_many_are_admitted_as_are_asked_for(self) -> None:
        house = full()
        waiting = [house.queue() for _ in range(3)]
        for _ in range(3):
            house.admission.release()
        assert house.admission.dispatch(house.now, 1) == waiting[:1]
        assert house.admission.dispatch(house.now) == waiting[1:]

    def test_criticality_is_named_in_metadata(self) -> None:
        assert list(BY_NAME) == ["CRITICAL_PLUS", "CRITICAL", "SHEDDABLE_PLUS", "SHEDDABLE"]


class TestShedding:
    def test_a_burst_may_wait(self) -> None:
        house = full()
        burst = [house.queue() for _ in range(50)]
        house.now += 0.09
        assert house.leave() == burst[:1]
        assert burst[0].admitted

    def test_when_delay_stands_the_oldest_go(self) -> None:
        house = full(target=0.01, interval=0.1)
        shed = []
        for _ in range(40):  # one comes and one leaves every 10 ms, so 20 wait for 200 ms each
            house.queue(SHED)
            house.queue(SHED)
            house.now += 0.01
            shed += [ticket for ticket in house.leave() if ticket.refused]
        assert shed
        assert {ticket.refused for ticket in shed} == {Reason.DELAY}
        assert house.admission.refusals[Reason.DELAY, SHED] == len(shed)
        # What is left is young.
        (codel, lane) = house.admission._lanes[SHED]
        assert codel.standing
        assert all(house.now - ticket.arrived <= 0.03 for ticket in lane)

    @pytest.mark.parametrize(("waiting", "drops"), [(10, False), (11, True)])
    def test_with_permits_to_spare_a_few_that_waited_long_are_let_in(self, waiting: int, drops: bool) -> None:
        # The process stood still; or it runs one handler after another, each holding its loop, and falls behind.
        house = House(target=0.01, interval=0.1, initial=20, most=20)
        for _ in range(20):
            for _ in range(waiting):
                house.queue(SHED)
            house.now += 0.09
            house.admission.dispatch(house.now, 0)
            settled = house.admission.dispatch(house.now)
            for _ in range(house.admission.in_flight):
                house.admission.release()
            while house.admission.waiting:
                settled += house.leave()
                house.admission.in_flight = 0
        assert bool(house.admission.refusals) is drops

    def test_the_important_go_through_while_the_sheddable_are_shed(self) -> None:
        house = full()
        critical, sheddable = [], []
        for number in range(1000):  # room for one each 10 ms; an important one every 20, three others in 20
            if number % 2:
                critical.append(house.queue(CRITICAL))
            else:
                sheddable += [house.queue(SHED) for _ in range(3)]
            house.now += 0.01
            house.leave()
            if house.admission.in_flight < 10:
                house.enter(10 - house.admission.in_flight)
        assert all(ticket.admitted for ticket in critical[:-1])
        assert sum(ticket.refused is Reason.DELAY for ticket in sheddable) > 900

    def test_a_full_queue_drops_the_oldest_of_the_least_important(self) -> None:
        house = full(queue_size=2)
        old, young = house.queue(SHED), house.queue(SHED)
        important = house.queue(CRITICAL)
        assert (old.refused, young.refused, important.refused) == (Reason.FULL, None, None)
        assert house.queue(PLUS).refused is None
        assert young.refused is Reason.FULL
        last = house.queue(SHED)  # nobody here matters less
        assert last.refused is Reason.FULL
        assert repr(last) == "<Ticket SHEDDABLE refused: full>"

    def test_one_that_is_gone_makes_room_without_being_refused(self) -> None:
        house = full(queue_size=2)
        gone, stays = house.queue(SHED), house.queue(SHED)
        house.admission.abandon(gone, house.now)
        assert house.queue().refused is None
        assert (house.admission.waiting, stays.refused) == (2, None)
        assert house.queue().refused is None
        assert (gone.refused, stays.refused) == (None, Reason.FULL)

    def test_one_that_went_from_the_middle_is_passed_over(self) -> None:
        house = full(queue_size=2)
        first, gone = house.queue(SHED), house.queue(SHED)
        house.admission.abandon(gone, house.now)
        last = house.queue(SHED)
        assert [house.queue().refused for _ in range(2)] == [None, None]
        assert (first.refused, gone.refused, last.refused) == (Reason.FULL, None, Reason.FULL)

    def test_one_that_was_refused_as_it_went_is_not_counted_twice(self) -> None:
        house = full(queue_size=1)
        gone, stays = house.queue(SHED), house.queue()
        assert gone.refused is Reason.FULL
        house.admission.abandon(gone, house.now)
        assert (house.admission.waiting, stays.refused) == (1, None)


class TestLeaving:
    def test_one_that_is_gone_before_its_turn_is_passed_over(self) -> None:
        house = full()
        gone, next_one = house.queue(), house.queue()
        house.admission.abandon(gone, house.now)
        assert house.leave() == [next_one]
        assert house.admission.waiting == 0

    def test_one_that_is_gone_just_as_it_was_admitted_gives_its_permit_back(self) -> None:
        house = full()
        gone, next_one = house.queue(), house.queue()
        assert house.leave() == [gone]
        assert house.admission.abandon(gone, house.now) == [next_one]
        assert house.admission.in_flight == 10

    def test_calls_that_ended_and_failed_are_counted(self) -> None:
        house = full()
        for ending in Ending:
            house.admission.leave(Latency(), 0.01, ending, house.now)
        assert (house.admission.ended, house.admission.failed, house.admission.in_flight) == (3, 1, 7)

    def test_the_limit_in_force_is_the_limiter_s(self) -> None:
        house = House(most=1000, initial=20)
        latency = Latency()
        house.enter(20)
        for number in range(20):
            house.admission.leave(latency, 0.01, Ending.OK, house.now + number)
            house.enter()
        assert house.admission.limit == house.admission.limiter.limit > 20


class TestClosing:
    def test_what_comes_is_refused_and_what_waits_still_gets_its_turn(self) -> None:
        house = full()
        waiting = house.queue()
        house.admission.close(Reason.DRAINING)
        late = house.queue()
        assert late.refused is Reason.DRAINING
        assert house.leave() == [waiting]
        house.leave()
        assert house.enter() == [False]
        assert repr(house.admission) == "<Admission 9/10 in flight, 0 waiting draining>"
        house.admission.open()
        assert house.enter() == [True]


class TestStreams:
    def test_a_stream_needs_a_permit_only_to_begin(self) -> None:
        house = House(max_streams=2)
        for _ in range(2):
            assert house.enter() == [True]
            assert house.admission.begin_stream(CRITICAL) is None
        assert (house.admission.in_flight, house.admission.streams) == (0, 2)
        house.enter()
        assert house.admission.begin_stream(CRITICAL) is Reason.STREAMS
        assert house.admission.in_flight == 0
        house.admission.end_stream(Ending.OK)
        house.admission.end_stream(Ending.FAILED)
        assert (house.admission.streams, house.admission.ended, house.admission.failed) == (0, 2, 1)


class TestLate:
    """A call that can't finish in time is refused while the server is busy."""

    @staticmethod
    def slow() -> Latency:
        latency = Latency()
        latency.median = 0.5
        return latency

    def test_one_without_a_deadline_is_never_late(self) -> None:
        assert full().admission.unfit(self.slow(), None, CRITICAL, 100.0) is None

    def test_one_that_has_expired_is_not_run(self) -> None:
        house = House()
        assert house.admission.unfit(Latency(), 0.0, CRITICAL, house.now) is Reason.EXPIRED

    def test_one_that_cannot_finish_is_refused_only_while_the_server_is_busy(self) -> None:
        house = full()
        assert house.admission.unfit(self.slow(), 0.1, CRITICAL, house.now) is None
        house.queue()
        assert house.admission.unfit(self.slow(), 0.1, CRITICAL, house.now) is Reason.LATE
        assert house.admission.unfit(self.slow(), 0.6, CRITICAL, house.now) is None
        assert house.admission.refusals == {(Reason.LATE, CRITICAL): 1}
        assert house.admission.unfit(self.slow(), 0.1, CRITICAL, house.now + 2.0) is None

    def test_a_dry_run_counts(self) -> None:
        house = full(late=Mode.DRY_RUN)
        house.queue()
        assert house.admission.unfit(self.slow(), 0.1, CRITICAL, house.now) is None
        assert house.admission.dry_run == {(Reason.LATE, CRITICAL): 1}
        assert house.admission.unfit(self.slow(), 0.0, CRITICAL, house.now) is Reason.EXPIRED

    def test_off_is_off(self) -> None:
        house = full(late=Mode.OFF)
        house.queue()
        assert house.admission.unfit(self.slow(), 0.1, CRITICAL, house.now) is None


class TestModes:
    def test_a_dry_run_admits_all_and_counts_whom_it_would_have_kept_waiting(self) -> None:
        house = House(initial=10, most=1000, overload=Mode.DRY_RUN)
        assert house.enter(10) == [True] * 10
        beyond = [house.queue() for _ in range(5)]
        assert all(ticket.admitted for ticket in beyond)
        assert house.admission.dry_run == {(Reason.DELAY, CRITICAL): 5}
        assert not house.admission.refusals
        for _ in range(10):
            house.leave()
        assert house.queue().admitted  # below the limit: nothing to count
        assert house.admission.dry_run == {(Reason.DELAY, CRITICAL): 5}

    def test_a_dry_run_keeps_to_the_most_all_the_same(self) -> None:
        house = full(overload=Mode.DRY_RUN)
        waiting = house.queue()
        assert not waiting.admitted
        house.now += 10
        assert house.leave() == [waiting]

    def test_off_is_the_most_and_nothing_else(self) -> None:
        house = House(initial=10, most=50, overload=Mode.OFF)
        assert house.enter(51, SHED) == [True] * 50 + [False]
        waiting = house.queue()
        for _ in range(50):
            house.now += 1.0
            house.leave()
        assert waiting.admitted


class TestCoDel:
    def test_delay_stands_when_not_one_call_in_an_interval_waited_less_than_the_target(self) -> None:
        codel = CoDel(target=0.01, interval=0.1)
        assert not any(codel.drops(0.05, 100 + step / 100) for step in range(10))
        assert codel.drops(0.05, 100.11)
        assert not codel.drops(0.015, 100.12)  # too young to go
        codel.drops(0.001, 100.15)
        assert not codel.drops(0.05, 100.22)

    def test_what_stood_before_a_quiet_time_is_no_news(self) -> None:
        codel = CoDel(target=0.01, interval=0.1)
        assert not any(codel.drops(0.05, 100 + step / 100) for step in range(10))
        assert not codel.drops(0.05, 200.0)


def test_every_reason_has_a_status() -> None:
    assert set(CODES) == set(Reason)


@pytest.mark.parametrize(("admitted", "text"), [(False, "waiting"), (True, "admitted")])
def test_a_ticket_says_how_it_stands(admitted: bool, text: str) -> None:
    ticket = Ticket(PLUS, 0.0, lambda: None)
    ticket.admitted = admitted
    assert repr(ticket) == f"<Ticket CRITICAL_PLUS {text}>"
