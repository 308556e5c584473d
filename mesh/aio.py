"""Weft for asyncio: channels that are drop-ins for ``grpc.aio``'s, and servers on an event loop.

    insecure_channel, secure_channel   create a ``grpc.aio.Channel`` to a service
    serve, Server                      serve until SIGTERM; or as an asynchronous context manager
    ServerInterceptor                  the same deadlines and errors for a ``grpc.aio.Server`` of your own; with a
    ServerAdmission                    also its overload protection and load reports

Everything else is in ``mesh``: ``mesh.explain``, ``mesh.remaining``, ``mesh.ServerSettings``, ...
"""

from mesh.channel.aio.channel import Channel, insecure_channel, secure_channel
from mesh.server.aio import Server, serve
from mesh.server.handlers.admission import AioServerAdmission as ServerAdmission
from mesh.server.handlers.interceptors import AioServerInterceptor as ServerInterceptor

__all__ = ["Channel", "Server", "ServerAdmission", "ServerInterceptor", "insecure_channel", "secure_channel", "serve"]
