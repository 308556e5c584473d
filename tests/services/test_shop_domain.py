"""Users, orders, pages and repeated requests, without IO."""

from __future__ import annotations

import datetime as dt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common import paging
from services.common.errors import InvalidFieldError
from services.common.idempotency import fingerprint
from services.order.domain import Item, Order
from services.user.domain import Name, User, email_key

NOW = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
TOKENS = paging.Tokens(b"k" * 32)
SEQUENCES = st.integers(min_value=0, max_value=2**63 - 1)


@pytest.mark.parametrize(
    ("given_size", "size"), [(0, 50), (1, 1), (50, 50), (999, 999), (1000, 1000), (1001, 1000), (2**31 - 1, 1000)]
)
def test_page_sizes_are_clamped(given_size: int, size: int) -> None:
    assert paging.size(given_size) == size


def test_the_first_page_needs_no_token() -> None:
    assert TOKENS.after("users", "") == 0


@given(listing=st.text(), sequence=SEQUENCES)
def test_a_token_returns_to_its_position_in_its_list(listing: str, sequence: int) -> None:
    assert TOKENS.after(listing, TOKENS.make(listing, sequence)) == sequence


@given(listing=st.text(), other=st.text(), sequence=SEQUENCES)
def test_a_token_is_invalid_for_other_lists(listing: str, other: str, sequence: int) -> None:
    if listing != other:
        with pytest.raises(InvalidFieldError, match="page_token: was not issued by this method"):
            TOKENS.after(other, TOKENS.make(listing, sequence))


@given(st.text(min_size=1))
def test_a_made_up_token_is_rejected(page_token: str) -> None:
    with pytest.raises(InvalidFieldError):
        TOKENS.after("users", page_token)


@given(rows=st.lists(st.integers(1, 10**6), max_size=9), size=st.integers(1, 8))
def test_a_page_knows_whether_there_are_more(rows: list[int], size: int) -> None:
    page = paging.Page.cut([(row, row) for row in rows[: size + 1]], size)
    assert list(page.items) == rows[:size]
    assert page.more == (len(rows) > size)
    assert page.last == (page.items[-1] if page.items else 0)


def test_emails_are_compared_case_insensitively() -> None:
    assert email_key("Ann@Example.COM") == email_key("ann@example.com")
    assert email_key("ann@example.com") != email_key("anna@example.com")


def test_a_user_keeps_the_email_as_entered() -> None:
    assert User.new("1", name=Name.of_full("Ann"), email="Ann@Example.COM", now=NOW).email == "Ann@Example.COM"


def test_a_name_with_a_nul_is_rejected() -> None:
    with pytest.raises(InvalidFieldError, match=r"name: must not contain U\+0000"):
        Name.of_full("An\0n")


CONTENTS = st.recursive(st.text() | st.integers(), lambda inner: st.lists(inner, max_size=4), max_leaves=8)


@given(CONTENTS, CONTENTS)
def test_different_contents_have_different_fingerprints(one: object, other: object) -> None:
    assert (fingerprint(one) == fingerprint(other)) == (one == other)  # type: ignore[arg-type]


def test_the_fingerprint_of_an_order_covers_its_request_and_nothing_else() -> None:
    def order(order_id: str, user_id: str, *items: Item, now: dt.datetime = NOW) -> str:
        return Order.new(order_id, user_id=user_id, items=items, now=now).fingerprint

    first = order("1", "ann", Item("tea", 1), Item("milk", 2))
    assert order("2", "ann", Item("tea", 1), Item("milk", 2), now=NOW + dt.timedelta(days=1)) == first
    assert order("1", "bob", Item("tea", 1), Item("milk", 2)) != first
    assert order("1", "ann", Item("milk", 2), Item("tea", 1)) != first
    assert order("1", "ann", Item("tea", 2), Item("milk", 2)) != first
