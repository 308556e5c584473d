"""The user service's gRPC surface, v1. v2 (``servicer_v2``) serves the same users and differs only in their names."""
# ruff: noqa: ARG002, N802 - gRPC defines the names and the parameters

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable

from services.common import paging
from services.common.rpc import Context, fields_to_update, timestamp, unary_method
from services.user.domain import Name, User
from services.user.store import Listing, UserStore
from weft.user.v1 import user_pb2 as pb
from weft.user.v1 import user_pb2_grpc

UPDATABLE = ("name", "email")
OUTPUT_ONLY = ("id", "etag", "create_time", "update_time", "delete_time")


def utc_now() -> dt.datetime:
    """The wall clock, in UTC."""
    return dt.datetime.now(dt.UTC)


class UserServicer(user_pb2_grpc.UserServiceServicer):
    """Serves the users in ``store``. ``now``: the wall clock, in UTC."""

    error_domain = "user.weft"

    def __init__(self, store: UserStore, now: Callable[[], dt.datetime] = utc_now) -> None:
        self._store = store
        self._now = now

    @unary_method
    async def CreateUser(self, request: pb.CreateUserRequest, context: Context) -> pb.CreateUserResponse:
        name = Name.of_full(request.name)
        user = User.new(str(uuid.uuid4()), name=name, email=request.email, now=self._now())
        return pb.CreateUserResponse(user=_message(await self._store.create(user, request.request_id.lower())))

    @unary_method
    async def GetUser(self, request: pb.GetUserRequest, context: Context) -> pb.GetUserResponse:
        return pb.GetUserResponse(user=_message(await self._store.get(request.id.lower())))

    @unary_method
    async def BatchGetUsers(self, request: pb.BatchGetUsersRequest, context: Context) -> pb.BatchGetUsersResponse:
        users = await self._store.get_all([user_id.lower() for user_id in request.ids])
        return pb.BatchGetUsersResponse(users=map(_message, users))

    @unary_method
    async def ListUsers(self, request: pb.ListUsersRequest, context: Context) -> pb.ListUsersResponse:
        listing = Listing(request.filter, request.order_by, request.show_deleted)
        key = f"weft.user.v1.UserService/ListUsers?{listing}"
        after = self._store.tokens.position(key, request.page_token)
        page = await self._store.list(paging.size(request.page_size), after, listing)
        token = self._store.tokens.make(key, *page.last) if page.more else ""
        return pb.ListUsersResponse(users=map(_message, page.items), next_page_token=token)

    @unary_method
    async def UpdateUser(self, request: pb.UpdateUserRequest, context: Context) -> pb.UpdateUserResponse:
        given = request.user
        mask = fields_to_update(request.update_mask, given, UPDATABLE, OUTPUT_ONLY)
        name = Name.of_full(given.name) if "name" in mask else None
        email = given.email if "email" in mask else None
        now = self._now()
        user = await self._store.change(
            given.id.lower(), given.etag, lambda user: user.changed(now, name=name, email=email)
        )
        return pb.UpdateUserResponse(user=_message(user))

    @unary_method
    async def DeleteUser(self, request: pb.DeleteUserRequest, context: Context) -> pb.DeleteUserResponse:
        now = self._now()
        user = await self._store.change(
            request.id.lower(), request.etag, lambda user: user.deleted(now, allow_deleted=request.allow_missing)
        )
        return pb.DeleteUserResponse(user=_message(user))

    @unary_method
    async def UndeleteUser(self, request: pb.UndeleteUserRequest, context: Context) -> pb.UndeleteUserResponse:
        now = self._now()
        user = await self._store.change(request.id.lower(), request.etag, lambda user: user.undeleted(now))
        return pb.UndeleteUserResponse(user=_message(user))


def _message(user: User) -> pb.User:
    return pb.User(
        id=user.id,
        name=user.name.full,
        email=user.email,
        create_time=timestamp(user.create_time),
        update_time=timestamp(user.update_time),
        etag=user.etag,
        delete_time=None if user.delete_time is None else timestamp(user.delete_time),
    )
