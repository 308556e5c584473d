"""The notification service's gRPC surface, v1."""
# ruff: noqa: ARG002, N802 - gRPC gives the names and the parameters

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from services.common import paging
from services.common.rpc import stream_method, timestamp, unary_method
from services.notification.domain import Notification
from services.notification.store import NotificationStore
from weft.notification.v1 import notification_pb2 as pb
from weft.notification.v1 import notification_pb2_grpc

POLL = 0.1
"""Seconds between two looks for new notifications, which another replica may have made; only while someone watches."""

AT_A_TIME = 100
"""Notifications that a watch reads at a time."""

Context = grpc.aio.ServicerContext[Any, Any]


class NotificationServicer(notification_pb2_grpc.NotificationServiceServicer):
    """Serves the notifications of ``store``."""

    error_domain = "notification.weft"

    def __init__(self, store: NotificationStore) -> None:
        self._store = store
        self._news = _News(store)

    @unary_method
    async def ListNotifications(
        self, request: pb.ListNotificationsRequest, context: Context
    ) -> pb.ListNotificationsResponse:
        user_id, order_id = request.user_id.lower(), request.order_id.lower()
        listing = f"weft.notification.v1.NotificationService/ListNotifications?user_id={user_id}&order_id={order_id}"
        page = await self._store.list(
            paging.size(request.page_size),
            self._store.tokens.after(listing, request.page_token),
            user_id=user_id,
            order_id=order_id,
        )
        return pb.ListNotificationsResponse(
            notifications=map(_message, page.items),
            next_page_token=self._store.tokens.make(listing, page.last) if page.more else "",
        )

    @stream_method
    async def WatchNotifications(
        self, request: pb.WatchNotificationsRequest, context: Context
    ) -> AsyncIterator[pb.WatchNotificationsResponse]:
        user_id = request.user_id.lower()
        watch = f"weft.notification.v1.NotificationService/WatchNotifications?user_id={user_id}"
        if request.resume_token:
            last = self._store.tokens.after(watch, request.resume_token, field="resume_token")
        else:
            last = await self._store.last()
            yield pb.WatchNotificationsResponse(resume_token=self._store.tokens.make(watch, last))
        while True:
            # Looked at before the rows are read: what comes in between is then read twice rather than never.
            newest = self._news.newest
            rows = await self._store.rows(AT_A_TIME, last, user_id=user_id)
            for last, notification in rows:
                yield pb.WatchNotificationsResponse(
                    notification=_message(notification), resume_token=self._store.tokens.make(watch, last)
                )
            if len(rows) < AT_A_TIME:
                await self._news.after(max(newest, last))


class _News:
    """Waits for new notifications: whoever waits looks for all the others too, one at a time."""

    def __init__(self, store: NotificationStore) -> None:
        self.newest = 0
        """The sequence number of the newest notification that was seen."""
        self._store = store
        self._looking = asyncio.Lock()

    async def after(self, sequence: int) -> None:
        """Return when there is a notification after ``sequence``. Raises what the store does."""
        while self.newest <= sequence:
            async with self._looking:
                if self.newest > sequence:
                    return
                await asyncio.sleep(POLL)
                self.newest = max(self.newest, await self._store.last())


def _message(notification: Notification) -> pb.Notification:
    return pb.Notification(
        id=notification.id,
        user_id=notification.user_id,
        order_id=notification.order_id,
        kind=pb.Notification.Kind.Value(f"KIND_{notification.kind.value}"),
        text=notification.text,
        event_time=timestamp(notification.event_time),
        create_time=timestamp(notification.create_time),
    )
