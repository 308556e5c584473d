"""Who gets in: at once while there is room, else in order of importance, and the least important are shed first."""

import contextlib
import math
from typing import Any

import pytest

from mesh.criticality import BY_NAME, Criticality
from mesh.policy.server.admission import Admission, AdmissionConfig, Mode
from mesh.policy.server.limiter import Ending
from mesh.policy.server.queue import Lane, Method, Ticket
from mesh.policy.server.reasons import STATUSES, Reason

PLUS, CRITICAL, SHED_PLUS, SHED = Criticality


class Server:
    """An admission with a clock and a method; ``timeout`` is what its callers allow."""

    def __init__(self, timeout: float = math.inf, **config: Any) -> None:
        self.admission = Admission(AdmissionConfig(**{"max_concurrency": 10, **config}), contextlib.nullcontext())
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
        limiter.limit, limiter.limited, limiter._window_start, limiter._update_due = to, True, self.now, self.now + 10
        self.admission._apply_limit(self.method)

    def lift(self) -> None:
        self.method.limiter._lift()
        self.admission._apply_limit(self.method)

    def lose(self, waited: float = 10.0) -> None:
        """Have a call lost in the queue."""
        self.admission._record_loss(self.method, CRITICAL, waited, self.now)


def full(**config: Any) -> Server:
    server = Server(**config)
    assert all(server.enter(10))
    return server


class TestEntering:
    def test_a_call_runs_at_once_while_there_is_room(self) -> None:
        server = Server()
        assert server.enter(11) == [True] * 10 + [False]
        assert repr(server.admission) == "<Admission 10/10 in flight, 0 waiting>"

    def test_the_sheddable_leave_room_for_the_rest(self) -> None:
        server = Server()
        assert server.enter(9, SHED) == [True] * 8 + [False]
        assert server.enter(2, SHED_PLUS) == [True, False]
        assert server.enter(2, CRITICAL) == [True, False]

    def test_nobody_passes_those_who_wait(self) -> None:
        server = full()
        server.queue()
        server.admission.leave(server.method, CRITICAL, 0.0, 0.01, math.inf, Ending.OK, server.now)
        assert server.enter() == [False]

    def test_a_permit_that_comes_free_goes_to_the_most_important_and_the_oldest_of_them(self) -> None:
        server = full()
        waiting = [server.queue(criticality) for criticality in (SHED, CRITICAL, CRITICAL, PLUS)]
        assert server.leave() == [waiting[3]]
        assert server.leave() == [waiting[1]]
        assert server.leave() == [waiting[2]]
        assert waiting[3].admitted
        assert server.leave() == []  # only eight of the ten permits are for the sheddable
        server.leave()
        assert server.leave() == [waiting[0]]

    def test_as_many_are_admitted_as_are_asked_for(self) -> None:
        server = full()
        waiting = [server.queue() for _ in range(3)]
        for _ in range(3):
            server.admission._release(server.method)
        assert server.admission.dispatch(server.now, 1) == waiting[:1]
        assert server.admission.dispatch(server.now) == waiting[1:]

    def test_criticality_is_named_in_metadata(self) -> None:
        assert list(BY_NAME) == ["CRITICAL_PLUS", "CRITICAL", "SHEDDABLE_PLUS", "SHEDDABLE"]


class TestMethods:
    """Each method has a limit of its own, at times."""

    def test_calls_of_a_method_that_is_limited_do_not_hold_up_the_others(self) -> None:
        server = Server()
        other = server.admission.method()
        server.enter(2)
        server.limit(2)
        waiting = server.queue()
        assert server.enter() == [False]
        assert server.enter(method=other) == [True]
        assert server.admission.dispatch(server.now) == []
        assert server.leave() == [waiting]
        assert repr(server.method).startswith("<Method <Limiter 2 in flight, limit 2,")

    def test_all_may_begin_when_the_limit_is_lifted(self) -> None:
        server = Server()
        server.enter(2)
        server.limit(2)
        waiting = [server.queue() for _ in range(3)]
        server.lift()
        assert server.enter() == [False]  # not before those who wait
        assert server.admission.dispatch(server.now) == waiting
        assert not server.admission.limited
        assert server.enter() == [True]

    def test_what_waits_becomes_the_limit_s_when_it_begins(self) -> None:
        server = full()
        server.queue()
        other = server.admission.method()
        server.limit(10)
        server.limit(5)
        server.admission._release(server.method)
        assert server.enter(method=other) == [True]

    def test_the_oldest_of_all_methods_begins_first(self) -> None:
        server = full()
        other = server.admission.method()
        first = server.queue()
        server.now += 1
        second = server.queue(method=other)
        server.now += 1
        third = server.queue()
        assert [server.leave() for _ in range(3)] == [[first], [second], [third]]

    def test_utilization_is_that_of_the_method_that_is_worst_off(self) -> None:
        server = Server()
        server.enter(2)
        assert server.admission.utilization == 0.2
        server.limit(2)
        server.queue()
        assert server.admission.utilization == 1.5


class TestWaiting:
    """A call is refused only when its time is up, or when calls like it were lost already."""

    def test_calls_wait_to_their_deadlines(self) -> None:
        server = full(timeout=30.0)
        waiting = [server.queue() for _ in range(100)]
        server.now += 29.9
        assert server.leave() == waiting[:1]
        assert not server.admission.refusals
        server.now += 0.2
        assert {ticket.refused for ticket in server.leave()} == {Reason.EXPIRED}
        assert server.admission.refusals == {(Reason.EXPIRED, CRITICAL): 99}

    def test_calls_without_a_deadline_wait_for_as_long_as_it_takes(self) -> None:
        server = full()
        server.lose()
        waiting = Ticket(server.method, CRITICAL, server.now, lambda: None)
        server.admission.wait(waiting)
        server.now += 3600
        server.lose()
        assert server.leave() == [waiting]
        assert waiting.admitted

    def test_a_caller_that_gives_up_is_no_loss_and_one_whose_time_is_up_is(self) -> None:
        server = full(timeout=1.0)
        gives_up, expires = server.queue(), server.queue()
        server.now += 0.5
        server.admission.abandon(gives_up, server.now)
        assert server.admission.last_loss == -math.inf
        server.now += 0.49
        server.admission.abandon(expires, server.now)
        assert server.admission.last_loss == server.now

    @pytest.mark.parametrize(("ending", "waited", "lost"), [
        (Ending.CANCELLED, 0.9, True),
        (Ending.FAILED, 0.9, True),  # so ends a handler whose own call ran out of the same time
        (Ending.OK, 0.9, False),
        (Ending.CANCELLED, 0.001, False),  # it is the handler that took the time
    ])  # fmt: skip
    def test_a_call_that_would_have_had_the_time_but_for_the_queue_is_a_loss(
        self, ending: Ending, waited: float, lost: bool
    ) -> None:
        server = full()
        server.leave(ending, waited=waited, left=0.0)
        assert (server.admission.last_loss == server.now) is lost

    def test_a_burst_that_runs_out_of_time_is_not_refused_early(self) -> None:
        server = full(timeout=5.0)
        burst = [server.queue() for _ in range(50)]
        for _ in range(40):  # losses last for two seconds; but the burst was here before
            server.now += 0.05
            server.lose(5.0)
            server.admission.dispatch(server.now)
        server.now += 2.9
        assert not any(ticket.refused for ticket in burst)

    def test_when_losses_last_those_that_came_since_are_refused_at_half_of_their_time(self) -> None:
        server = full(timeout=4.0)
        server.lose()
        early = server.queue()
        other = server.queue(timeout=60.0)
        for _ in range(21):
            server.now += 0.1
            server.lose()
            server.admission.dispatch(server.now)
        assert (early.refused, other.refused) == (Reason.DELAY, None)
        assert server.admission.refusals == {(Reason.DELAY, CRITICAL): 1}

    def test_losses_that_do_not_last_refuse_nobody_early(self) -> None:
        server = full(timeout=1.0)
        server.lose()
        waiting = server.queue()
        server.now += 0.9
        assert server.leave() == [waiting]
        assert waiting.admitted

    def test_calls_that_had_little_time_need_shorter_proof(self) -> None:
        lane = Lane()
        lasting = []
        for waited, now in ((0.25, 100.0), (0.25, 100.2), (0.25, 100.25), (10.0, 200.0)):
            lane.record_loss(waited, 1.0, now)
            lasting.append(lane.sustained)
        assert lasting == [False, False, True, False]  # the third was long ago, seen from the fourth
        assert lane.is_losing(201.0)
        assert not lane.is_losing(201.1)

    def test_one_that_expired_on_its_way_is_not_run(self) -> None:
        server = full()
        assert server.admission.expire(server.method, CRITICAL, server.now - 1, server.now) is Reason.EXPIRED
        assert server.admission.in_flight == server.method.limiter.in_flight == 9
        assert server.admission.last_loss == server.now


class TestFull:
    def test_a_full_queue_drops_the_oldest_of_the_least_important(self) -> None:
        server = full(queue_size=2)
        old, young = server.queue(SHED), server.queue(SHED)
        important = server.queue(CRITICAL)
        assert (old.refused, young.refused, important.refused) == (Reason.FULL, None, None)
        assert server.queue(PLUS).refused is None
        assert young.refused is Reason.FULL
        last = server.queue(SHED)  # nobody here matters less
        assert last.refused is Reason.FULL
        assert repr(last) == "<Ticket SHEDDABLE refused: full>"

    def test_one_that_is_gone_makes_room_without_being_refused(self) -> None:
        server = full(queue_size=2)
        gone, stays = server.queue(SHED), server.queue(SHED)
        server.admission.abandon(gone, server.now)
        assert server.queue().refused is None
        assert (server.admission.waiting, stays.refused) == (2, None)
        assert server.queue().refused is None
        assert (gone.refused, stays.refused) == (None, Reason.FULL)

    def test_one_that_went_from_the_middle_is_passed_over(self) -> None:
        server = full(queue_size=2)
        first, gone = server.queue(SHED), server.queue(SHED)
        server.admission.abandon(gone, server.now)
        last = server.queue(SHED)
        assert [server.queue().refused for _ in range(2)] == [None, None]
        assert (first.refused, gone.refused, last.refused) == (Reason.FULL, None, Reason.FULL)

    def test_one_that_was_refused_as_it_went_is_not_counted_twice(self) -> None:
        server = full(queue_size=1)
        gone, stays = server.queue(SHED), server.queue()
        assert gone.refused is Reason.FULL
        server.admission.abandon(gone, server.now)
        assert (server.admission.waiting, stays.refused) == (1, None)


class TestLeaving:
    def test_one_that_is_gone_before_its_turn_is_passed_over(self) -> None:
        server = full()
        gone, next_one = server.queue(), server.queue()
        server.admission.abandon(gone, server.now)
        assert server.leave() == [next_one]
        assert server.admission.waiting == 0

    def test_one_that_is_gone_just_as_it_was_admitted_gives_its_permit_back(self) -> None:
        server = full()
        gone, next_one = server.queue(), server.queue()
        assert server.leave() == [gone]
        server.admission.abandon(gone, server.now)
        assert server.admission.dispatch(server.now) == [next_one]
        assert server.admission.in_flight == 10

    def test_calls_that_ended_and_failed_are_counted(self) -> None:
        server = full()
        for ending in Ending:
            server.leave(ending)
        assert (server.admission.completed, server.admission.failures, server.admission.in_flight) == (3, 1, 7)


class TestClosing:
    def test_what_comes_is_refused_and_what_waits_still_gets_its_turn(self) -> None:
        server = full()
        waiting = server.queue()
        server.admission.close(Reason.DRAINING)
        late = server.queue()
        assert late.refused is Reason.DRAINING
        assert server.leave() == [waiting]
        server.leave()
        assert server.enter() == [False]
        assert repr(server.admission) == "<Admission 9/10 in flight, 0 waiting draining>"
        server.admission.open()
        assert server.enter() == [True]


class TestStreams:
    def test_a_stream_needs_a_permit_only_to_begin(self) -> None:
        server = Server(max_streams=2)
        for _ in range(2):
            assert server.enter() == [True]
            assert server.admission.begin_stream(server.method, CRITICAL) is None
        assert (server.admission.in_flight, server.admission.streams) == (0, 2)
        server.enter()
        assert server.admission.begin_stream(server.method, CRITICAL) is Reason.STREAMS
        assert server.admission.in_flight == 0
        server.admission.end_stream(Ending.OK)
        server.admission.end_stream(Ending.FAILED)
        assert (server.admission.streams, server.admission.completed, server.admission.failures) == (0, 2, 1)


class TestLate:
    """When calls were lost, one that can't finish in time is refused before it begins."""

    @staticmethod
    def losing(**config: Any) -> Server:
        server = full(timeout=0.6, **config)
        server.method.limiter.median = 0.3
        return server

    def test_one_that_cannot_finish_is_refused_only_after_others_were_lost(self) -> None:
        server = self.losing()
        first = server.queue()
        server.now += 0.3
        assert server.leave() == [first]
        assert first.admitted
        late, fit = server.queue(), server.queue(timeout=5.0)
        server.lose()
        server.now += 0.3
        assert server.leave() == [late, fit]
        assert (late.refused, fit.admitted) == (Reason.LATE, True)
        assert server.admission.refusals == {(Reason.LATE, CRITICAL): 1}

    def test_that_is_forgotten_after_a_second(self) -> None:
        server = self.losing()
        server.lose()
        server.now += 1.1
        waiting = server.queue()
        server.now += 0.3
        assert server.leave() == [waiting]
        assert waiting.admitted

    def test_a_dry_run_counts_each_once(self) -> None:
        server = self.losing(late=Mode.DRY_RUN)
        waiting = server.queue()
        server.lose()
        server.now += 0.3
        server.admission.dispatch(server.now)
        assert server.leave() == [waiting]
        assert waiting.admitted
        assert server.admission.dry_run == {(Reason.LATE, CRITICAL): 1}

    def test_off_is_off(self) -> None:
        server = self.losing(late=Mode.OFF)
        waiting = server.queue()
        server.lose()
        server.now += 0.3
        assert server.leave() == [waiting]
        assert waiting.admitted


class TestModes:
    def test_a_dry_run_admits_all_and_counts_whom_it_would_have_kept_waiting(self) -> None:
        server = Server(max_concurrency=1000, overload=Mode.DRY_RUN)
        server.enter(10)
        server.limit(10)
        assert server.enter() == [False]
        beyond = [server.queue() for _ in range(5)]
        assert all(ticket.admitted for ticket in beyond)
        assert server.admission.dry_run == {(Reason.DELAY, CRITICAL): 5}
        assert not server.admission.refusals
        for _ in range(10):
            server.leave()
        assert server.queue().admitted  # below the limit: nothing to count
        assert server.admission.dry_run == {(Reason.DELAY, CRITICAL): 5}

    def test_a_dry_run_keeps_to_the_most_all_the_same(self) -> None:
        server = full(overload=Mode.DRY_RUN)
        server.limit(5)
        waiting = server.queue()
        assert not waiting.admitted
        server.now += 10
        assert server.leave() == [waiting]

    def test_off_is_the_most_and_nothing_else(self) -> None:
        server = Server(max_concurrency=50, overload=Mode.OFF, timeout=60.0)
        server.limit(5)
        assert server.enter(51, SHED) == [True] * 50 + [False]
        waiting = server.queue()
        for _ in range(50):
            server.now += 1.0
            server.lose()
            server.leave()
        assert waiting.admitted


def test_every_reason_has_a_status() -> None:
    assert set(STATUSES) == set(Reason)


@pytest.mark.parametrize(("admitted", "text"), [(False, "waiting"), (True, "admitted")])
def test_a_ticket_says_how_it_stands(admitted: bool, text: str) -> None:
    ticket = Ticket(Server().method, PLUS, 0.0, lambda: None)
    ticket.admitted = admitted
    assert repr(ticket) == f"<Ticket CRITICAL_PLUS {text}>"
