"""The user service's gRPC surface, v1."""
# ruff: noqa: ARG002, N802 - gRPC gives the names and the parameters

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable
from typing import Any

import grpc

from services import paging
from services.rpc import answered, timestamp
from services.user.domain import User
from services.user.store import UserStore
from weft.user.v1 import user_pb2, user_pb2_grpc

_LISTING = "weft.user.v1.UserService/ListUsers"

Context = grpc.aio.ServicerContext[Any, Any]


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


class UserServicer(user_pb2_grpc.UserServiceServicer):
    """Serves the users of ``store``. ``now``: the wall clock, in UTC."""

    error_domain = "user.weft"

    def __init__(self, store: UserStore, now: Callable[[], dt.datetime] = _now) -> None:
        self._store = store
        self._now = now

    @answered
    async def CreateUser(self, request: user_pb2.CreateUserRequest, context: Context) -> user_pb2.CreateUserResponse:
        user = User.new(str(uuid.uuid4()), name=request.name, email=request.email, now=self._now())
        return user_pb2.CreateUserResponse(user=_message(await self._store.create(user, request.request_id.lower())))

    @answered
    async def GetUser(self, request: user_pb2.GetUserRequest, context: Context) -> user_pb2.GetUserResponse:
        return user_pb2.GetUserResponse(user=_message(await self._store.get(request.id.lower())))

    @answered
    async def ListUsers(self, request: user_pb2.ListUsersRequest, context: Context) -> user_pb2.ListUsersResponse:
        page = await self._store.list(paging.size(request.page_size), paging.after(_LISTING, request.page_token))
        return user_pb2.ListUsersResponse(
            users=map(_message, page.items), next_page_token=paging.token(_LISTING, page.last) if page.more else ""
        )


def _message(user: User) -> user_pb2.User:
    return user_pb2.User(
        id=user.id,
        name=user.name,
        email=user.email,
        create_time=timestamp(user.create_time),
        update_time=timestamp(user.update_time),
    )
