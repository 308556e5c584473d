"""Who gets in: at once while there is room, else in order of importance, and the least important are shed first."""

import contextlib
import math
from typing import Any

import pytest

from mesh.criticality import BY_NAME, Criticality
from mesh.policy.server.admission import CODES, Admission, AdmissionConfig, Lane, Method, Mode, Reason, Ticket
from mesh.policy.server.limiter import Ending

PLUS, CRITICAL, SHED_PLUS, SHED = Criticality


class House:
    """An admission with a clock and a method; ``timeout`` is what its callers allow."""

    def __init__(self, timeout: float = math.inf, **config: Any) -> None:
        self.admission = Admission(AdmissionConfig(**{"most": 10, **config}), contextlib.nullcontext())
        self.method = self.admission.method()
        self.now = 100.0
        self.timeout = timeout

    def enter(self, count: int = 1, criticality: Criticality = CRITICAL, method: Method | None = None) -> list[bool]:
        return [self.admission.enter(method or self.method, criticality) for _ in range(count)]

    def queue(
        self, criticality: Criticality = CRITICAL, *, timeout: float | None = None, method: Method | None = None
    ) -> Ticket:
        deadline = self.now + (self.timeout if timeout is None else timeout)
        ticket = Ticket(method or self.method, criticality, self.now, lambda: None, deadline)
        self.admission.wait(ticket)
        return ticket

    def leave(self, ending: Ending = Ending.OK, *, waited: float = 0.0, left: float = math.inf) -> list[Ticket]:
        self.admission.leave(self.method, CRITICAL, waited, 0.01, left, ending, self.now)
        return self.admission.dispatch(self.now)

    def limit(self, to: int) -> None:
        """Have the method limited, as its limiter would."""
        limiter = self.method.limiter
        limiter.limit, limiter.limited, limiter._began, limiter._due = to, True, self.now, self.now + 10
        self.admission._limit(self.method)

    def lift(self) -> None:
        self.method.limiter._lift()
        self.admission._limit(self.method)

    def lose(self, waited: float = 10.0) -> None:
        """Have a call lost in the queue."""
        self.admission._lose(self.method, CRITICAL, waited, self.now)


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
        house.admission.leave(house.method, CRITICAL, 0.0, 0.01, math.inf, Ending.OK, house.now)
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
            house.admission._release(house.method)
        assert house.admission.dispatch(house.now, 1) == waiting[:1]
        assert house.admission.dispatch(house.now) == waiting[1:]

    def test_criticality_is_named_in_metadata(self) -> None:
        assert list(BY_NAME) == ["CRITICAL_PLUS", "CRITICAL", "SHEDDABLE_PLUS", "SHEDDABLE"]


class TestMethods:
    """Each method has a limit of its own, at times."""

    def test_calls_of_a_method_that_is_limited_do_not_hold_up_the_others(self) -> None:
        house = House()
        other = house.admission.method()
        house.enter(2)
        house.limit(2)
        waiting = house.queue()
        assert house.enter() == [False]
        assert house.enter(method=other) == [True]
        assert house.admission.dispatch(house.now) == []
        assert house.leave() == [waiting]
        assert repr(house.method).startswith("<Method <Limiter 2 in flight, limit 2,")

    def test_all_may_begin_when_the_limit_is_lifted(self) -> None:
        house = House()
        house.enter(2)
        house.limit(2)
        waiting = [house.queue() for _ in range(3)]
        house.lift()
        assert house.enter() == [False]  # not before those who wait
        assert house.admission.dispatch(house.now) == waiting
        assert not house.admission.limited
        assert house.enter() == [True]

    def test_what_waits_becomes_the_limit_s_when_it_begins(self) -> None:
        house = full()
        house.queue()
        other = house.admission.method()
        house.limit(10)
        house.limit(5)
        house.admission._release(house.method)
        assert house.enter(method=other) == [True]

    def test_the_oldest_of_all_methods_begins_first(self) -> None:
        house = full()
        other = house.admission.method()
        first = house.queue()
        house.now += 1
        second = house.queue(method=other)
        house.now += 1
        third = house.queue()
        assert [house.leave() for _ in range(3)] == [[first], [second], [third]]

    def test_utilization_is_that_of_the_method_that_is_worst_off(self) -> None:
        house = House()
        house.enter(2)
        assert house.admission.utilization == 0.2
        house.limit(2)
        house.queue()
        assert house.admission.utilization == 1.5


class TestWaiting:
    """A call is refused only when its time is up, or when calls like it were lost already."""

    def test_calls_wait_to_their_deadlines(self) -> None:
        house = full(timeout=30.0)
        waiting = [house.queue() for _ in range(100)]
        house.now += 29.9
        assert house.leave() == waiting[:1]
        assert not house.admission.refusals
        house.now += 0.2
        assert {ticket.refused for ticket in house.leave()} == {Reason.EXPIRED}
        assert house.admission.refusals == {(Reason.EXPIRED, CRITICAL): 99}

    def test_calls_without_a_deadline_wait_for_as_long_as_it_takes(self) -> None:
        house = full()
        house.lose()
        waiting = Ticket(house.method, CRITICAL, house.now, lambda: None)
        house.admission.wait(waiting)
        house.now += 3600
        house.lose()
        assert house.leave() == [waiting]
        assert waiting.admitted

    def test_a_caller_that_gives_up_is_no_loss_and_one_whose_time_is_up_is(self) -> None:
        house = full(timeout=1.0)
        gives_up, expires = house.queue(), house.queue()
        house.now += 0.5
        house.admission.abandon(gives_up, house.now)
        assert house.admission.last_loss == -math.inf
        house.now += 0.49
        house.admission.abandon(expires, house.now)
        assert house.admission.last_loss == house.now

    @pytest.mark.parametrize(("ending", "waited", "lost"), [
        (Ending.CANCELLED, 0.9, True),
        (Ending.FAILED, 0.9, True),  # so ends a handler whose own call ran out of the same time
        (Ending.OK, 0.9, False),
        (Ending.CANCELLED, 0.001, False),  # it is the handler that took the time
    ])  # fmt: skip
    def test_a_call_that_would_have_had_the_time_but_for_the_queue_is_a_loss(
        self, ending: Ending, waited: float, lost: bool
    ) -> None:
        house = full()
        house.leave(ending, waited=waited, left=0.0)
        assert (house.admission.last_loss == house.now) is lost

    def test_a_burst_that_runs_out_of_time_is_not_refused_early(self) -> None:
        house = full(timeout=5.0)
        burst = [house.queue() for _ in range(50)]
        for _ in range(40):  # losses last for two seconds; but the burst was here before
            house.now += 0.05
            house.lose(5.0)
            house.admission.dispatch(house.now)
        house.now += 2.9
        assert not any(ticket.refused for ticket in burst)

    def test_when_losses_last_those_that_came_since_are_refused_at_half_of_their_time(self) -> None:
        house = full(timeout=4.0)
        house.lose()
        early = house.queue()
        other = house.queue(timeout=60.0)
        for _ in range(21):
            house.now += 0.1
            house.lose()
            house.admission.dispatch(house.now)
        assert (early.refused, other.refused) == (Reason.DELAY, None)
        assert house.admission.refusals == {(Reason.DELAY, CRITICAL): 1}

    def test_losses_that_do_not_last_refuse_nobody_early(self) -> None:
        house = full(timeout=1.0)
        house.lose()
        waiting = house.queue()
        house.now += 0.9
        assert house.leave() == [waiting]
        assert waiting.admitted

    def test_calls_that_had_little_time_need_shorter_proof(self) -> None:
        lane = Lane()
        lasting = []
        for waited, now in ((0.25, 100.0), (0.25, 100.2), (0.25, 100.25), (10.0, 200.0)):
            lane.lost(waited, 1.0, now)
            lasting.append(lane.lasting)
        assert lasting == [False, False, True, False]  # the third was long ago, seen from the fourth
        assert lane.is_losing(201.0)
        assert not lane.is_losing(201.1)

    def test_one_that_expired_on_its_way_is_not_run(self) -> None:
        house = full()
        assert house.admission.expire(house.method, CRITICAL, house.now - 1, house.now) is Reason.EXPIRED
        assert house.admission.in_flight == house.method.limiter.in_flight == 9
        assert house.admission.last_loss == house.now


class TestFull:
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
        house.admission.abandon(gone, house.now)
        assert house.admission.dispatch(house.now) == [next_one]
        assert house.admission.in_flight == 10

    def test_calls_that_ended_and_failed_are_counted(self) -> None:
        house = full()
        for ending in Ending:
            house.leave(ending)
        assert (house.admission.ended, house.admission.failed, house.admission.in_flight) == (3, 1, 7)


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
            assert house.admission.begin_stream(house.method, CRITICAL) is None
        assert (house.admission.in_flight, house.admission.streams) == (0, 2)
        house.enter()
        assert house.admission.begin_stream(house.method, CRITICAL) is Reason.STREAMS
        assert house.admission.in_flight == 0
        house.admission.end_stream(Ending.OK)
        house.admission.end_stream(Ending.FAILED)
        assert (house.admission.streams, house.admission.ended, house.admission.failed) == (0, 2, 1)


class TestLate:
    """When calls were lost, one that can't finish in time is refused before it begins."""

    @staticmethod
    def losing(**config: Any) -> House:
        house = full(timeout=0.6, **config)
        house.method.limiter.median = 0.3
        return house

    def test_one_that_cannot_finish_is_refused_only_after_others_were_lost(self) -> None:
        house = self.losing()
        first = house.queue()
        house.now += 0.3
        assert house.leave() == [first]
        assert first.admitted
        late, fit = house.queue(), house.queue(timeout=5.0)
        house.lose()
        house.now += 0.3
        assert house.leave() == [late, fit]
        assert (late.refused, fit.admitted) == (Reason.LATE, True)
        assert house.admission.refusals == {(Reason.LATE, CRITICAL): 1}

    def test_that_is_forgotten_after_a_second(self) -> None:
        house = self.losing()
        house.lose()
        house.now += 1.1
        waiting = house.queue()
        house.now += 0.3
        assert house.leave() == [waiting]
        assert waiting.admitted

    def test_a_dry_run_counts_each_once(self) -> None:
        house = self.losing(late=Mode.DRY_RUN)
        waiting = house.queue()
        house.lose()
        house.now += 0.3
        house.admission.dispatch(house.now)
        assert house.leave() == [waiting]
        assert waiting.admitted
        assert house.admission.dry_run == {(Reason.LATE, CRITICAL): 1}

    def test_off_is_off(self) -> None:
        house = self.losing(late=Mode.OFF)
        waiting = house.queue()
        house.lose()
        house.now += 0.3
        assert house.leave() == [waiting]
        assert waiting.admitted


class TestModes:
    def test_a_dry_run_admits_all_and_counts_whom_it_would_have_kept_waiting(self) -> None:
        house = House(most=1000, overload=Mode.DRY_RUN)
        house.enter(10)
        house.limit(10)
        assert house.enter() == [False]
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
        house.limit(5)
        waiting = house.queue()
        assert not waiting.admitted
        house.now += 10
        assert house.leave() == [waiting]

    def test_off_is_the_most_and_nothing_else(self) -> None:
        house = House(most=50, overload=Mode.OFF, timeout=60.0)
        house.limit(5)
        assert house.enter(51, SHED) == [True] * 50 + [False]
        waiting = house.queue()
        for _ in range(50):
            house.now += 1.0
            house.lose()
            house.leave()
        assert waiting.admitted


def test_every_reason_has_a_status() -> None:
    assert set(CODES) == set(Reason)


@pytest.mark.parametrize(("admitted", "text"), [(False, "waiting"), (True, "admitted")])
def test_a_ticket_says_how_it_stands(admitted: bool, text: str) -> None:
    ticket = Ticket(House().method, PLUS, 0.0, lambda: None)
    ticket.admitted = admitted
    assert repr(ticket) == f"<Ticket CRITICAL_PLUS {text}>"
