"""A program that uses every public name as notifications would. mypy checks it, in strict mode; it isn't run."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import grpc
import grpc.aio

import mesh
import mesh.aio
import mesh.testing
import mesh.testing.aio
from weft.notification.v1 import notification_pb2, notification_pb2_grpc

TARGET = "mesh:///weft.notification.v1.NotificationService"


def call() -> str:
    with mesh.insecure_channel(TARGET, options=[("grpc.service_config", "{}")]) as channel:
        as_grpc: grpc.Channel = channel
        notifications = notification_pb2_grpc.NotificationServiceStub(as_grpc)
        request = notification_pb2.ListNotificationsRequest(user_id="1")
        try:
            response, call = notifications.ListNotifications.with_call(request, timeout=5, metadata=(("x-trace", "1"),))
        except grpc.RpcError as error:
            if isinstance(error, mesh.RpcError):
                print(error.explain().attempts)
            return describe(mesh.explain(error))
        print(len(response.notifications), mesh.explain(call))
        return describe_channel(channel)


def describe(explanation: mesh.Explanation) -> str:
    attempts: tuple[mesh.AttemptRecord, ...] = explanation.attempts
    return ", ".join(f"{attempt.address}: {attempt.code} after {attempt.seconds}" for attempt in attempts)


def describe_channel(channel: mesh.Channel | mesh.aio.Channel) -> str:
    stats: mesh.ChannelStats = channel.stats()
    endpoints: tuple[mesh.EndpointStats, ...] = stats.endpoints
    latencies = [each.latency for each in endpoints if not each.ejected]
    return f"{stats.target} {stats.state} {stats.retry_budget:.1f} {dict(stats.ejections)} {latencies}"


def secure(credentials: grpc.ChannelCredentials) -> grpc.Channel:
    return mesh.secure_channel(TARGET, credentials, compression=grpc.Compression.Gzip)


async def call_with_asyncio(credentials: grpc.ChannelCredentials) -> notification_pb2.ListNotificationsResponse:
    async with mesh.aio.secure_channel(TARGET, credentials), mesh.aio.insecure_channel(TARGET) as channel:
        as_grpc: grpc.aio.Channel = channel
        await as_grpc.channel_ready()
        return await notification_pb2_grpc.NotificationServiceStub(channel).ListNotifications(
            notification_pb2.ListNotificationsRequest(user_id="1")
        )


class Notifications(notification_pb2_grpc.NotificationServiceServicer):
    def ListNotifications(  # noqa: N802
        self, request: notification_pb2.ListNotificationsRequest, context: grpc.ServicerContext
    ) -> notification_pb2.ListNotificationsResponse:
        left: float | None = mesh.remaining()
        with mesh.detach():
            print(left, mesh.Criticality.SHEDDABLE.name)
        return notification_pb2.ListNotificationsResponse()

    def WatchNotifications(  # noqa: N802
        self, request: notification_pb2.WatchNotificationsRequest, context: grpc.ServicerContext
    ) -> Iterator[notification_pb2.WatchNotificationsResponse]:
        yield notification_pb2.WatchNotificationsResponse()


class Observer(mesh.ServerObserver):
    def handled(self, method: str, code: int, seconds: float) -> None:
        print(method, code, seconds)

    def refused(self, method: str, reason: str) -> None:
        print(method, reason)


SERVICERS = [(notification_pb2_grpc.add_NotificationServiceServicer_to_server, Notifications())]


def own_servers() -> None:
    grpc.aio.server(interceptors=[mesh.aio.ServerInterceptor(admission=mesh.aio.ServerAdmission())])
    with mesh.Server(SERVICERS, mesh.ServerSettings(overload=mesh.Mode.DRY_RUN, observer=Observer())) as server:
        print(server.address, mesh.ServerInterceptor(mesh.ServerAdmission()))


async def serve_with_asyncio() -> int:
    async with mesh.aio.Server(SERVICERS, mesh.ServerSettings(listen="127.0.0.1:0")) as server:
        print(server.port)
    return await mesh.aio.serve(SERVICERS)


def test_with_threads() -> None:
    clock = mesh.testing.FakeClock(tick=1.0)
    with mesh.testing.Mesh() as testing:
        replicas: list[mesh.testing.Replica] = testing.serve(SERVICERS, replicas=2)
        faults: mesh.testing.Faults = testing.faults
        with faults.fail(grpc.StatusCode.UNAVAILABLE, replica=replicas[0], times=1):
            fault: mesh.testing.Fault = faults.delay(0.1, method="ListNotifications")
        channel: mesh.Channel = testing.channel("weft.notification.v1.NotificationService")
        calls: mesh.testing.Calls = testing.calls
        call: mesh.testing.RecordedCall = calls.wait(1, replica="NotificationService-0")[0]
        code: grpc.StatusCode | None = call.code
        print(clock(), code, fault.injected, describe_channel(channel))


async def test_with_asyncio() -> None:
    async with mesh.testing.aio.Mesh() as testing:
        replicas: list[mesh.testing.aio.Replica] = await testing.serve(SERVICERS)
        await replicas[0].drain()
        channel: mesh.aio.Channel = testing.channel("weft.notification.v1.NotificationService")
        calls: mesh.testing.aio.Calls = testing.calls
        print(describe_channel(channel), [call.metadata for call in await calls.wait()])


if __name__ == "__main__":
    print(mesh.__version__)
    sys.exit(mesh.serve(SERVICERS))
