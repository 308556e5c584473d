"""The notification service's gRPC surface, v1."""
# ruff: noqa: ARG002, N802 - gRPC defines the names and the parameters

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

POLL_INTERVAL = 0.1
"""Seconds between two checks for new notifications of other replicas, while there are watches."""

BATCH = 100
"""How many notifications a watch reads at once."""

Context = grpc.aio.ServicerContext[Any, Any]


class NotificationServicer(notification_pb2_grpc.NotificationServiceServicer):
    """Serves the notifications of ``store``."""

    error_domain = "notification.weft"

    def __init__(self, store: NotificationStore) -> None:
        self._store = store
        self._poller = _Poller(store)

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
            # Before the rows are read, so that what is added in between is read twice rather than never.
            newest = self._poller.newest
            rows = await self._store.read(BATCH, last, user_id=user_id)
            for last, notification in rows:
                yield pb.WatchNotificationsResponse(
                    notification=_message(notification), resume_token=self._store.tokens.make(watch, last)
                )
            if len(rows) < BATCH:
                await self._poller.wait(max(newest, last))


class _Poller:
    """Waits for new notifications; one query at a time serves all waiters."""

    def __init__(self, store: NotificationStore) -> None:
        self.newest = 0
        """The sequence number of the newest known notification."""
        self._store = store
        self._polling = asyncio.Lock()

    async def wait(self, after: int) -> None:
        """Return once there is a notification after the sequence number ``after``. Raises what the store does."""
        while self.newest <= after:
            async with self._polling:
                if self.newest > after:
                    return
                await asyncio.sleep(POLL_INTERVAL)
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
