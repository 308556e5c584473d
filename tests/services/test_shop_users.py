"""Users in both API versions: changed, deleted, undeleted, filtered, sorted, paged."""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from mesh.testing import FakeClock
from services.common.rpc import reject_unparsable
from services.user import store as user_store
from services.user.domain import Name
from services.user.servicer import UserServicer
from services.user.servicer_v2 import UserServicerV2
from services.user.store import UserStore
from tests.services.calling import NOBODY, failure, reason, violations
from tests.services.conftest import Open, serving
from weft.user.v1 import user_pb2 as v1
from weft.user.v1 import user_pb2_grpc as v1_grpc
from weft.user.v2 import user_pb2 as v2
from weft.user.v2 import user_pb2_grpc as v2_grpc

if TYPE_CHECKING:
    from weft.user.v1.user_pb2_grpc import UserServiceAsyncStub as UsersV1
    from weft.user.v2.user_pb2_grpc import UserServiceAsyncStub as UsersV2

NOW = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)


@pytest.fixture
async def both(open_database: Open) -> AsyncIterator[tuple[UsersV1, UsersV2]]:
    """A user service with both API versions. Its clock advances a second whenever it is read."""
    clock = FakeClock(tick=1.0)

    def now() -> dt.datetime:
        return NOW + dt.timedelta(seconds=clock())

    store = UserStore(open_database("user", user_store.VERSIONS))

    def add(server: grpc.aio.Server) -> None:
        reject_unparsable(v1_grpc.add_UserServiceServicer_to_server)(UserServicer(store, now), server)
        reject_unparsable(v2_grpc.add_UserServiceServicer_to_server)(UserServicerV2(store, now), server)

    async with serving(add) as channel:
        yield v1_grpc.UserServiceStub(channel), v2_grpc.UserServiceStub(channel)


@pytest.fixture
def users(both: tuple[UsersV1, UsersV2]) -> UsersV1:
    return both[0]


@pytest.fixture
def users_v2(both: tuple[UsersV1, UsersV2]) -> UsersV2:
    return both[1]


async def create(users: UsersV1, name: str = "Ann", email: str = "ann@example.com") -> v1.User:
    return (await users.CreateUser(v1.CreateUserRequest(name=name, email=email))).user


async def get(users: UsersV1, user_id: str) -> v1.User:
    return (await users.GetUser(v1.GetUserRequest(id=user_id))).user


def update(user_id: str, *mask: str, etag: str = "", **values: str) -> v1.UpdateUserRequest:
    return v1.UpdateUserRequest(
        user=v1.User(id=user_id, etag=etag, **values),  # type: ignore[arg-type]
        update_mask=FieldMask(paths=mask),
    )


async def names(users: UsersV1, page_size: int = 2, **listing: str | bool) -> list[str]:
    """The names in a list, read page by page."""
    found: list[str] = []
    token = ""
    while True:
        page = await users.ListUsers(
            v1.ListUsersRequest(page_size=page_size, page_token=token, **listing)  # type: ignore[arg-type]
        )
        found += [user.name for user in page.users]
        token = page.next_page_token
        if not token:
            return found


async def test_an_update_changes_only_the_fields_in_its_mask(users: UsersV1) -> None:
    ann = await create(users)
    changed = (await users.UpdateUser(update(ann.id, "name", name="Anne", email="other@example.com"))).user
    assert (changed.name, changed.email) == ("Anne", "ann@example.com")
    assert changed.etag != ann.etag
    assert changed.update_time.ToDatetime() > ann.update_time.ToDatetime()
    assert changed.create_time == ann.create_time
    assert await get(users, ann.id) == changed


async def test_without_a_mask_all_set_fields_are_changed(users: UsersV1) -> None:
    ann = await create(users)
    changed = (await users.UpdateUser(update(ann.id, email="anne@example.com"))).user
    assert (changed.name, changed.email) == ("Ann", "anne@example.com")


async def test_an_update_that_changes_nothing_keeps_the_etag(users: UsersV1) -> None:
    ann = await create(users)
    assert (await users.UpdateUser(update(ann.id, "name", "email", name="Ann", email=ann.email))).user == ann


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (update(NOBODY, "nickname"), {"update_mask": "UNKNOWN_FIELD"}),
        (update(NOBODY, "name"), {"name": "EMPTY"}),
        (update(NOBODY, "name", name="x" * 101), {"user.name": "string.max_len"}),
        (update(NOBODY, "email", email="ann"), {"user.email": "string.email"}),
        (update("42", "name", name="Ann"), {"user.id": "string.uuid"}),
        (v1.UpdateUserRequest(), {"user": "required"}),
    ],
    ids=["unknown", "empty", "long", "email", "id", "no user"],
)
async def test_an_invalid_update_is_rejected(
    users: UsersV1, request_: v1.UpdateUserRequest, expected: dict[str, str]
) -> None:
    assert violations(await failure(users.UpdateUser(request_))) == expected


async def test_an_email_can_not_be_removed(users: UsersV1) -> None:
    ann = await create(users)
    assert violations(await failure(users.UpdateUser(update(ann.id, "*", name="Ann")))) == {"user.email": "EMPTY"}


async def test_output_only_fields_in_a_mask_are_ignored(users: UsersV1) -> None:
    ann = await create(users)
    changed = (await users.UpdateUser(update(ann.id, "create_time", "name", name="Anne"))).user
    assert changed.create_time == ann.create_time
    assert changed.name == "Anne"


async def test_a_change_with_an_outdated_etag_is_aborted(users: UsersV1) -> None:
    ann = await create(users)
    first = (await users.UpdateUser(update(ann.id, "name", name="Anne", etag=ann.etag))).user
    for late in (
        users.UpdateUser(update(ann.id, "name", name="Anna", etag=ann.etag)),
        users.DeleteUser(v1.DeleteUserRequest(id=ann.id, etag=ann.etag)),
        users.UndeleteUser(v1.UndeleteUserRequest(id=ann.id, etag=ann.etag)),
    ):
        assert reason(await failure(late)) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
    assert await get(users, ann.id) == first


async def test_an_email_of_another_user_can_not_be_taken(users: UsersV1) -> None:
    ann, bob = await create(users), await create(users, "Bob", "bob@example.com")
    error = await failure(users.UpdateUser(update(bob.id, "email", email="ANN@example.com")))
    assert reason(error) == (grpc.StatusCode.ALREADY_EXISTS, "EMAIL_TAKEN")
    await users.UpdateUser(update(ann.id, "email", email="ANN@example.com"))
    assert (await get(users, ann.id)).email == "ANN@example.com"


async def test_a_deleted_user_can_only_be_read_and_undeleted(users: UsersV1) -> None:
    ann = await create(users)
    deleted = (await users.DeleteUser(v1.DeleteUserRequest(id=ann.id))).user
    assert deleted.HasField("delete_time")
    assert await get(users, ann.id) == deleted
    assert await names(users) == []
    assert await names(users, show_deleted=True) == ["Ann"]
    assert reason(await failure(users.UpdateUser(update(ann.id, "name", name="Anne")))) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "USER_DELETED",
    )
    taken = users.CreateUser(v1.CreateUserRequest(name="Ann", email="ann@example.com"))
    assert reason(await failure(taken)) == (grpc.StatusCode.ALREADY_EXISTS, "EMAIL_TAKEN")
    back = (await users.UndeleteUser(v1.UndeleteUserRequest(id=ann.id))).user
    assert not back.HasField("delete_time")
    assert (back.name, back.email) == (ann.name, ann.email)
    assert await names(users) == ["Ann"]


async def test_deleting_twice_is_an_error_unless_allowed(users: UsersV1) -> None:
    ann = await create(users)
    deleted = (await users.DeleteUser(v1.DeleteUserRequest(id=ann.id))).user
    again = await failure(users.DeleteUser(v1.DeleteUserRequest(id=ann.id)))
    assert reason(again) == (grpc.StatusCode.NOT_FOUND, "USER_NOT_FOUND")
    assert (await users.DeleteUser(v1.DeleteUserRequest(id=ann.id, allow_missing=True))).user == deleted


async def test_a_user_that_is_not_deleted_can_not_be_undeleted(users: UsersV1) -> None:
    ann = await create(users)
    error = await failure(users.UndeleteUser(v1.UndeleteUserRequest(id=ann.id)))
    assert reason(error) == (grpc.StatusCode.ALREADY_EXISTS, "USER_NOT_DELETED")


async def test_a_batch_is_returned_in_request_order_or_not_at_all(users: UsersV1) -> None:
    created = [await create(users, f"User {n}", f"{n}@example.com") for n in range(3)]
    wanted = [created[2], created[0], created[2]]
    found = await users.BatchGetUsers(v1.BatchGetUsersRequest(ids=[user.id.upper() for user in wanted]))
    assert list(found.users) == wanted
    error = await failure(users.BatchGetUsers(v1.BatchGetUsersRequest(ids=[created[0].id, NOBODY])))
    assert reason(error) == (grpc.StatusCode.NOT_FOUND, "USER_NOT_FOUND")
    assert violations(await failure(users.BatchGetUsers(v1.BatchGetUsersRequest(ids=["1"])))) == {
        "ids[0]": "string.uuid"
    }


ORDERS = [
    ("", ["bob", "Ann", "cid", "Ann", "Äsop"]),
    ("name", ["Ann", "Ann", "bob", "cid", "Äsop"]),
    ("name desc", ["Äsop", "cid", "bob", "Ann", "Ann"]),
    ("email", ["Äsop", "Ann", "cid", "Ann", "bob"]),
    ("create_time desc", ["Äsop", "Ann", "cid", "Ann", "bob"]),
]


@pytest.mark.parametrize(("order_by", "expected"), ORDERS, ids=[order_by or "none" for order_by, _ in ORDERS])
@pytest.mark.parametrize("page_size", [1, 2, 5])
async def test_lists_are_sorted_on_pages_of_any_size(
    users: UsersV1, order_by: str, expected: list[str], page_size: int
) -> None:
    for n, name in enumerate(["bob", "Ann", "cid", "Ann", "Äsop"]):
        await create(users, name, f"{'EdCba'[n]}@example.com")
    assert await names(users, page_size, order_by=order_by) == expected


@pytest.mark.parametrize(
    ("filter", "expected"),
    [
        ('name = "Ann"', ["Ann"]),
        ('name = "Ann*"', ["Ann", "Anne", "Ann*e"]),
        ('name = "*"', ["Ann", "Anne", "bob", "Ann*e"]),
        ('name != "Ann" AND name != "bob"', ["Anne", "Ann*e"]),
        ('email = "ANN@example.com"', ["Ann"]),
        ('email="b*"AND name=bob', ["bob"]),
        ('create_time >= "2026-01-02T04:04:07+01:00"', ["bob", "Ann*e"]),
        ('create_time < "2026-01-02T03:04:06Z" AND update_time <= "2026-12-31T00:00:00Z"', ["Ann"]),
        ('name = "no \\"one\\""', []),
    ],
)
async def test_lists_contain_what_matches_their_filter(users: UsersV1, filter: str, expected: list[str]) -> None:
    for name in ["Ann", "Anne", "bob", "Ann*e"]:
        await create(
            users, name, f"{name.lower().replace('*', '')}-{name[3:4] == '*'}@example.com".replace("-False", "")
        )
    assert await names(users, filter=filter) == expected


@pytest.mark.parametrize(
    "filter",
    [
        "name",
        "name =",
        'name = "Ann',
        "shoe_size = 42",
        'name = "Ann" OR name = "bob"',
        'name = "Ann" name = "bob"',
        'name = "Ann" AND',
        'name < "Ann"',
        'name != "Ann*"',
        'name = "An\0n"',
        'create_time > "yesterday"',
        'create_time > "2026-01-01T00:00:00"',
        'create_time > "0001-01-01T00:00:00+14:00"',
        "(name = Ann)",
    ],
)
async def test_an_invalid_filter_is_rejected(users: UsersV1, filter: str) -> None:
    error = await failure(users.ListUsers(v1.ListUsersRequest(filter=filter)))
    assert violations(error) == {"filter": "INVALID_FILTER"}


@pytest.mark.parametrize("order_by", ["id", "name up", "name desc desc", "name, email", "-name"])
async def test_an_unsupported_order_is_rejected(users: UsersV1, order_by: str) -> None:
    error = await failure(users.ListUsers(v1.ListUsersRequest(order_by=order_by)))
    assert violations(error) == {"order_by": "INVALID_ORDER_BY"}


async def test_a_token_is_only_valid_for_the_same_list(users: UsersV1) -> None:
    for n in range(3):
        await create(users, f"User {n}", f"{n}@example.com")
    token = (await users.ListUsers(v1.ListUsersRequest(page_size=1, order_by="name"))).next_page_token
    for other in ({"order_by": "email"}, {"order_by": "name", "filter": 'name = "U*"'}, {}):
        error = await failure(
            users.ListUsers(
                v1.ListUsersRequest(page_token=token, **other)  # type: ignore[arg-type]
            )
        )
        assert violations(error) == {"page_token": "INVALID_PAGE_TOKEN"}


@pytest.mark.parametrize("order_by", ["", "name", "email desc"])
async def test_existing_users_are_listed_once_whatever_is_written_between_pages(users: UsersV1, order_by: str) -> None:
    there = [(await create(users, f"User {n:02}", f"{n:02}@example.com")).id for n in range(10)]
    gone = [(await create(users, f"Gone {n}", f"gone{n}@example.com")).id for n in range(3)]
    seen: list[str] = []
    token = ""
    for n in range(99):
        page = await users.ListUsers(v1.ListUsersRequest(page_size=3, page_token=token, order_by=order_by))
        seen += [user.id for user in page.users]
        token = page.next_page_token
        if not token:
            break
        if gone:
            await users.DeleteUser(v1.DeleteUserRequest(id=gone.pop()))
        await create(users, f"{'AUZ'[n % 3]} new {n}", f"{'0gz'[n % 3]}new{n}@example.com")
        if n == 8:
            token = ""
            break
    assert len(seen) == len(set(seen))
    assert set(there) <= set(seen)


async def test_v2_serves_the_users_of_v1_with_their_names_in_parts(users: UsersV1, users_v2: UsersV2) -> None:
    by_v2 = (
        await users_v2.CreateUser(
            v2.CreateUserRequest(name=v2.UserName(given="Ann Marie", family="van Dyk"), email="ann@example.com")
        )
    ).user
    assert (by_v2.name.given, by_v2.name.family) == ("Ann Marie", "van Dyk")
    seen = await get(users, by_v2.id)
    assert seen.name == "Ann Marie van Dyk"
    assert (seen.id, seen.email, seen.etag, seen.create_time) == (
        by_v2.id,
        by_v2.email,
        by_v2.etag,
        by_v2.create_time,
    )
    assert (await users_v2.GetUser(v2.GetUserRequest(id=by_v2.id))).user == by_v2
    assert list((await users_v2.ListUsers(v2.ListUsersRequest())).users) == [by_v2]
    assert list((await users_v2.BatchGetUsers(v2.BatchGetUsersRequest(ids=[by_v2.id]))).users) == [by_v2]


async def test_each_version_returns_a_name_as_it_was_set_through_it(users: UsersV1, users_v2: UsersV2) -> None:
    ann = await create(users, "Ann  Marie Smith ")
    assert ann.name == "Ann  Marie Smith "
    split = (await users_v2.GetUser(v2.GetUserRequest(id=ann.id))).user.name
    assert (split.given, split.family) == ("Ann  Marie", "Smith")
    changed = await users_v2.UpdateUser(
        v2.UpdateUserRequest(
            user=v2.User(id=ann.id, name=v2.UserName(family="Jones")), update_mask=FieldMask(paths=["name.family"])
        )
    )
    assert (changed.user.name.given, changed.user.name.family) == ("Ann  Marie", "Jones")
    assert (await get(users, ann.id)).name == "Ann  Marie Jones"
    await users.UpdateUser(update(ann.id, "name", name="Cher"))
    alone = (await users_v2.GetUser(v2.GetUserRequest(id=ann.id))).user.name
    assert (alone.given, alone.family) == ("Cher", "")


async def test_v2_deletes_and_undeletes(users: UsersV1, users_v2: UsersV2) -> None:
    ann = await create(users)
    deleted = (await users_v2.DeleteUser(v2.DeleteUserRequest(id=ann.id, etag=ann.etag))).user
    assert deleted.HasField("delete_time")
    assert (await get(users, ann.id)).HasField("delete_time")
    back = (await users_v2.UndeleteUser(v2.UndeleteUserRequest(id=ann.id))).user
    assert (await get(users, ann.id)).etag == back.etag


async def test_v2_rejects_names_without_a_given_name(users_v2: UsersV2) -> None:
    unnamed = v2.CreateUserRequest(name=v2.UserName(family="Smith"), email="ann@example.com")
    assert violations(await failure(users_v2.CreateUser(unnamed))) == {"name.given": "EMPTY"}
    without = v2.CreateUserRequest(email="ann@example.com")
    assert violations(await failure(users_v2.CreateUser(without))) == {"name": "required"}


@pytest.mark.parametrize(
    ("whole", "given", "family"),
    [("Ann", "Ann", ""), ("Ann Smith", "Ann", "Smith"), (" Ann B. Smith ", "Ann B.", "Smith"), (" ", "", "")],
)
def test_the_last_of_several_words_is_the_family_name(whole: str, given: str, family: str) -> None:
    name = Name.of_full(whole)
    assert (name.given, name.family) == (given, family)
