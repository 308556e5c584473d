"""The statuses that the mesh itself makes, for docs/statuses.md.

``tests/packaging/test_docs_statuses.py`` holds the table to the code: each text stands in mesh/, each status that mesh/
makes stands here, and a part of them is made by real clients, servers and registries.
"""

from __future__ import annotations

import textwrap
from typing import NamedTuple


class Status(NamedTuple):
    """``message``: what varies is in angle brackets; a bar is where the code joins two texts. ``code``: gRPC's name, or
    an exception's."""

    code: str
    message: str
    cause: str
    remedy: str


STATUSES: dict[str, tuple[str, tuple[Status, ...]]] = {
    "No endpoint to call": (
        (
            "`<target>` is the channel's target; of a list of addresses the first two. Nothing was sent for these "
            "calls. An error names three endpoints at most, those with a known cause first."
        ),
        (
            Status(
                "UNAVAILABLE",
                "<target>|: |<address>|: |<cause>",
                "The target has one endpoint, and it can't be called. The cause is the connection's last error "
                "(“Connection refused”), or a health check that failed.",
                "Start the server or correct the address. A call made with `wait_for_ready=True` waits.",
            ),
            Status(
                "UNAVAILABLE",
                "<target>|: |<ready>| of |<all>| endpoints connected|: |<address>|: |<cause>|, |<address>|: |<cause>",
                "None of the endpoints can be called.",
                "As above.",
            ),
            Status(
                "UNAVAILABLE",
                "<target>|: |<address>| |<state>| for |<seconds>| s",
                "The endpoint can't be called, and gRPC core names no cause.",
                "Look at the server.",
            ),
            Status(
                "UNAVAILABLE",
                "<target>|: |<address>|: |health check of |<service>| returned |<status>",
                "The endpoint is connected, and says that it doesn't serve: it starts, drains, or knows no health for "
                "this service.",
                "Look at the server: its `ready` hook may wait for something. For a server that isn't "
                "the mesh's, name the service whose health it reports in `healthCheckConfig`.",
            ),
            Status(
                "UNAVAILABLE",
                "<target>|: |<address>|: |health check returned |<status>",
                "The same for the health of the server as a whole.",
                "Look at the server.",
            ),
            Status(
                "UNAVAILABLE",
                "<target>|: |<address>|: |health check failed: |<code>|: |<text>",
                "The endpoint ended its health checks, and asking once more failed as the text says.",
                "Look at the server.",
            ),
            Status(
                "UNAVAILABLE",
                "<target>|: |registry |<address>| knows no instance of |<service>|; known services: |<services>",
                "The registry answered, and nobody is registered under this name.",
                "Correct the name in the target, or start the service with `MESH_REGISTRY`.",
            ),
            Status(
                "UNAVAILABLE",
                "<target>|: |registry |<address>| knows no instance of |<service>|; it knows no services",
                "The registry answered, and nobody is registered at all.",
                "Start the services, or correct `MESH_REGISTRY`: it may be another registry.",
            ),
            Status(
                "UNAVAILABLE",
                "<target>|: |registry |<address>|: |<code>|: |<text>",
                "The registry refuses connections, and no endpoint is known from before.",
                "Start the registry or correct its address. With `MESH_CACHE` a client starts without it.",
            ),
            Status(
                "UNAVAILABLE",
                "<target>|: |registry |<address>|: |no response within |<seconds>| s",
                "The registry says nothing, and no endpoint is known from before; the call's deadline came meanwhile.",
                "Look at the registry and the network between.",
            ),
            Status(
                "UNAVAILABLE",
                "<target>|: |dns: |<host>|: |<text>",
                "The name has no addresses (at once), or the name server doesn't answer (at the call's deadline).",
                "Correct the name, or look at the name server.",
            ),
            Status(
                "UNAVAILABLE",
                "<target>|: |dns: |<host>| is not a name: |<text>",
                "The target's host can't be a host name.",
                "Correct the target.",
            ),
            Status(
                "UNAVAILABLE",
                "<target>|: |no endpoints",
                "The resolver answered with an empty list and gave no reason.",
                "Look at what the target's resolver reads.",
            ),
            Status(
                "UNAVAILABLE",
                "<target>|: |<task>| failed: |<exception>|: |<text>|; retrying in |<seconds>| s",
                "The mesh's own task that finds endpoints or connects to them (`discovery`, `connecting`) raised. The "
                "log has the traceback; the task is restarted.",
                "Report it, with the traceback.",
            ),
            Status(
                "UNAVAILABLE",
                "no connection to send it on",
                "Endpoints were READY, and each time the connection was gone when the call was to be sent. The mesh "
                "tried others, and paused, before it gave up.",
                "Look at why connections break: a proxy or load balancer with short limits, servers that restart.",
            ),
        ),
    ),
    "Deadlines": (
        (
            "gRPC core's own “Deadline Exceeded” means that a server had the call and didn't answer in time. The "
            "mesh's words say what the call waited for instead."
        ),
        (
            Status(
                "DEADLINE_EXCEEDED",
                "<target>|: |<ready>| of |<all>| endpoints connected| after |<seconds>| s|: |<address>|: |<cause>",
                "The call waits for ready, and no endpoint could be called by its deadline. Nothing was sent.",
                "The causes are those above.",
            ),
            Status(
                "DEADLINE_EXCEEDED",
                "<target>|: |<ready>| of |<all>| endpoints connected| after |<seconds>| s|: |<address>| |<state>| for "
                "|<seconds>| s",
                "The call waited for an endpoint to connect, to its deadline. Nothing was sent.",
                "Look at the endpoints that are CONNECTING: hosts that drop packets, servers that are out of threads.",
            ),
            Status(
                "DEADLINE_EXCEEDED",
                "<target>|: |<text>| after |<seconds>| s",
                "The call waits for ready, and no endpoint was known by its deadline; the text is one of those above.",
                "As above.",
            ),
            Status(
                "DEADLINE_EXCEEDED",
                "<target>|: |<source>| has not answered| for |<seconds>| s",
                "The call's deadline came before the first answer of the registry or of DNS.",
                "Look at what doesn't answer, or give first calls more time.",
            ),
            Status(
                "DEADLINE_EXCEEDED",
                "the deadline had passed before the call was sent",
                "The call was made with a timeout of 0 or less, or in a handler whose own call has no time left.",
                "Check `mesh.remaining()` before long work. Put what must outlive the inbound "
                "call into `with mesh.detach():`.",
            ),
            Status(
                "DEADLINE_EXCEEDED",
                "<target>|: not sent within |<seconds>| s; ready endpoints: |<count>",
                "Endpoints were READY, and the time was over before the call could be sent: the process is busy, or "
                "connections broke.",
                "Give the process more CPU, or the call more time.",
            ),
            Status(
                "DEADLINE_EXCEEDED",
                "no response within the attempt timeout of |<seconds>| s",
                "`attemptTimeout` ended the last attempt. The call is made again where its retry policy and its "
                "deadline allow it.",
                "Raise `attemptTimeout`, or look at the endpoint that `explain()` names.",
            ),
            Status(
                "DEADLINE_EXCEEDED",
                "no response within perAttemptRecvTimeout, |<seconds>| s",
                "The last attempt had no response by then.",
                "Raise `perAttemptRecvTimeout`, or look at the endpoint.",
            ),
        ),
    ),
    "Calls that the client refuses": (
        "They are never retried, count against no endpoint, and reach none.",
        (
            Status(
                "UNAVAILABLE",
                "refused by the client: |<count>| calls are outstanding, and the limit for |<criticality>| calls is "
                "|<count>| (overload.maxOutstanding in the service config)",
                "More calls are in flight or waiting than `overload.maxOutstanding` allows for their criticality.",
                "Look at why they pile up (a slow service, calls without deadlines), or raise the limit.",
            ),
            Status(
                "RESOURCE_EXHAUSTED",
                "refused by the client: the service refuses |<criticality>| calls, so |<share>| of them aren't sent",
                "`overload.adaptiveThrottle` is on, and the service refused more than half of what was sent to it.",
                "Add capacity to the service. The throttle lets calls through again by itself.",
            ),
        ),
    ),
    "Calls that end in the client": (
        "",
        (
            Status(
                "CANCELLED",
                "Locally cancelled by application!",
                "The program cancelled the call, or the handler that made it was cancelled.",
                "Nothing to do.",
            ),
            Status(
                "CANCELLED",
                "Channel closed!",
                "The channel was closed while the call was in flight.",
                "Close channels after their calls; `close(grace)` of asyncio channels waits.",
            ),
            Status(
                "CANCELLED",
                "Call cancelled in fork child",
                "The process was forked while the call was in flight: it goes on in the parent alone.",
                "See [forking.md](forking.md).",
            ),
            Status(
                "INTERNAL",
                "Invalid metadata",
                "A key or a value of the call's metadata can't be sent: keys are lower case, values printable ASCII "
                "unless the key ends in `-bin`.",
                "Correct the metadata.",
            ),
            Status(
                "INTERNAL",
                "<exception>|: |<text>",
                "The mesh itself raised while it drove the call.",
                "Report it.",
            ),
        ),
    ),
    "Only in `explain()`": (
        "Attempts that end so don't decide how their call ends.",
        (
            Status("CANCELLED", "another attempt answered first", "A hedge lost the race.", "Nothing to do."),
            Status(
                "CANCELLED", "the call was cancelled", "The attempt ran when its call was cancelled.", "Nothing to do."
            ),
            Status(
                "CANCELLED",
                "interrupted",
                "An exception such as KeyboardInterrupt ended a blocking call; that exception is what the caller gets.",
                "Nothing to do.",
            ),
        ),
    ),
    "Exceptions that a client raises": (
        (
            "They are raised at once, where the channel or the call is made. Arguments of wrong types raise TypeError "
            "and targets that can't be understood ValueError, each with a text that says what is expected."
        ),
        (
            Status(
                "ValueError",
                "Cannot invoke RPC on closed channel!",
                "A call on a channel that was closed.",
                "Keep the channel open as long as its stubs are used.",
            ),
            Status(
                "ValueError",
                "target |<target>|: no registry; set |<variable>|=host:port, or write mesh://host:port/|<service>",
                "A `mesh:///` target, and `MESH_REGISTRY` isn't set.",
                "Set it, before the channel is made.",
            ),
            Status(
                "ValueError",
                "target |<target>|: unknown scheme |<scheme>|; known: |<schemes>|, and host:port",
                "The target begins with a scheme that neither the mesh nor gRPC has.",
                "Correct the target.",
            ),
            Status(
                "RuntimeError",
                "process |<pid>| was forked from |<pid>| while |<what>| in use: calls can't work here. |<remedy>",
                "gRPC core was in use when the process was forked.",
                "See [forking.md](forking.md).",
            ),
            Status(
                "RuntimeError",
                "<channel>| belongs to another event loop, |<loop>| at |<address>|. Create a channel for each loop.",
                "An asyncio channel is used on another loop than the one of its first call.",
                "Create a channel for each loop (for each `asyncio.run`).",
            ),
        ),
    ),
    "Refusals of a server": (
        (
            "The handler wasn't called, but for the streams that a drain ends. Those marked * come with a pushback "
            "(`grpc-retry-pushback-ms`): when to try again. [overload.md](overload.md) says when each begins."
        ),
        (
            Status(
                "UNAVAILABLE",
                "not ready yet",
                "The `ready` hook of the server's settings hasn't returned true. *",
                "Wait; if it lasts, look at what the hook waits for.",
            ),
            Status(
                "UNAVAILABLE",
                "shutting down",
                "The server drains: a call that came late, or a stream that was open for longer than "
                "`MESH_STREAM_GRACE`. *",
                "Retry; mesh clients do, on another endpoint, where the method may be retried. Resume streams.",
            ),
            Status(
                "RESOURCE_EXHAUSTED",
                "overloaded: |<method>| is limited to |<count>| at a time| and the call waited for |<milliseconds>| ms",
                "Calls of this method miss their deadlines because of load, so the server limits it. *",
                "Add replicas, or look at what the handler waits for.",
            ),
            Status(
                "RESOURCE_EXHAUSTED",
                "overloaded: calls miss their deadlines in the queue| and the call waited for |<milliseconds>| ms",
                "All permits are taken, and calls that wait for one miss their deadlines. *",
                "Add replicas, or raise `MESH_MAX_CONCURRENCY` (`MESH_MAX_WORKERS` on threads) if the CPU is idle.",
            ),
            Status(
                "RESOURCE_EXHAUSTED",
                "overloaded: the queue is full| (MESH_QUEUE_SIZE=|<count>|)",
                "More calls wait than `MESH_QUEUE_SIZE`. *",
                "Look for handlers that hang; give calls deadlines.",
            ),
            Status(
                "RESOURCE_EXHAUSTED",
                "too many streams are open| (MESH_MAX_STREAMS=|<count>|)",
                "More streams are open than `MESH_MAX_STREAMS`, or than a threaded server has threads for. *",
                "Close streams that aren't used, raise the limit, or serve with asyncio.",
            ),
            Status(
                "DEADLINE_EXCEEDED",
                "overloaded: less time is left than the method takes",
                "Calls were lost in the queue, and this one has less time left than 1.5 times its method's median.",
                "Add replicas, or give the calls more time.",
            ),
            Status(
                "DEADLINE_EXCEEDED",
                "the deadline passed before the handler started",
                "The call waited in the queue to its deadline, or came too late.",
                "Add replicas, or give the calls more time.",
            ),
        ),
    ),
    "Failures of a handler": (
        "",
        (
            Status(
                "INTERNAL",
                "internal error, id |<id>",
                "The handler raised. The text of an exception may be secret, so the caller gets an id alone; an ERROR "
                "of the logger `mesh.server` has the same id, and the traceback.",
                "Search the server's log for the id. To answer with a status of your own, `context.abort`.",
            ),
            Status(
                "INVALID_ARGUMENT",
                "the request's bytes are not a message of the method's request type",
                "The caller's stub is made from another proto, or the request is corrupt.",
                "Compare the protos of client and server.",
            ),
        ),
    ),
    "Health of a server and of the registry": (
        "",
        (
            Status(
                "NOT_FOUND",
                "unknown service |<service>",
                "`Check` was asked for a service that isn't served here, as `grpc.health.v1` has it.",
                "Ask for a service's full name, or for “” (the whole server).",
            ),
            Status(
                "UNAVAILABLE",
                "the server is shutting down",
                "A health watch of an asyncio server or a registry ends because that drains.",
                "Nothing to do.",
            ),
            Status(
                "UNIMPLEMENTED",
                "with interceptors on the server, each of these streams holds a thread; the limit is reached",
                "A threaded server whose interceptors rebuild handlers has as many health watches and load reports as "
                "it has threads for. Clients then treat it as healthy (A17).",
                "See [instrumentation.md](instrumentation.md).",
            ),
        ),
    ),
    "Answers of the registry": (
        (
            "INVALID_ARGUMENT begins with the path of the field, and names all fields that are wrong; `BadRequest` "
            "details come with it where grpcio-status is installed. Limits are in [limits.md](limits.md)."
        ),
        (
            Status(
                "INVALID_ARGUMENT",
                '<field>|: |must be a service\'s full name, such as "weft.user.v1.UserService"',
                "The service's name is empty, too long, or no name.",
                "Use the name in the proto: package and service.",
            ),
            Status("INVALID_ARGUMENT", "<field>|: |must be set", "The instance has no id.", "Set `MESH_INSTANCE_ID`."),
            Status(
                "INVALID_ARGUMENT",
                '<field>|: |must be "host:port", "[ipv6]:port" or "unix:path": |<text>',
                "The address can't be called.",
                "Correct `MESH_ADVERTISE`.",
            ),
            Status(
                "INVALID_ARGUMENT",
                "<field>|: |must be an address that other hosts can reach, not a wildcard",
                "The address is `0.0.0.0` or `[::]`.",
                "Set `MESH_ADVERTISE`.",
            ),
            Status(
                "INVALID_ARGUMENT",
                "<field>|: |must be the address of one host, not of many",
                "The address is a multicast or broadcast address.",
                "Set `MESH_ADVERTISE`.",
            ),
            Status(
                "INVALID_ARGUMENT",
                "<field>|: |must be an address that other hosts can reach: a |<kind>| is accepted only from the "
                "registry's own host, and |<peer>| is another host; set MESH_ADVERTISE",
                "A loopback address, a link-local address or a unix socket is registered from another host.",
                "Set `MESH_ADVERTISE` to an address that clients can reach.",
            ),
            Status(
                "INVALID_ARGUMENT",
                "<field>|: |has a character that can't be printed",
                "It would pass for something else in logs and on screens.",
                "Remove it.",
            ),
            Status(
                "INVALID_ARGUMENT",
                "<field>|: |must be from 1 to |<count>|, or 0 for 1",
                "The weight is too large.",
                "Correct `MESH_WEIGHT`.",
            ),
            Status(
                "INVALID_ARGUMENT",
                "<field>|: |has more than |<count>| labels",
                "Too many labels.",
                "Shorten `MESH_METADATA`.",
            ),
            Status(
                "INVALID_ARGUMENT",
                "<field>|: |is longer than |<count>",
                "An id, address or label is too long.",
                "Shorten it.",
            ),
            Status(
                "INVALID_ARGUMENT",
                "<field>|: |has |<count>| bytes; the limit is |<count>",
                "The instance or the service config is too large.",
                "Shorten it.",
            ),
            Status(
                "INVALID_ARGUMENT",
                "<field>|: |has |<count>| ids; the limit is |<count>",
                "One `KeepAlive` message has too many leases.",
                "Send them in several messages.",
            ),
            Status(
                "INVALID_ARGUMENT",
                "service_config.|<path>|: |<text>",
                "The service config is wrong at this path. The one before still holds.",
                "Correct it; [service-config.md](service-config.md) has every key.",
            ),
            Status(
                "INVALID_ARGUMENT",
                "<field>|: |must not be negative",
                "`page_size` is below 0.",
                "Leave it out, or ask for 1 or more.",
            ),
            Status(
                "INVALID_ARGUMENT",
                "<field>|: |must be the next_page_token of a page of the same service",
                "The token isn't the registry's, or belongs to another listing.",
                "Begin again without a token.",
            ),
            Status(
                "RESOURCE_EXHAUSTED",
                "the registry knows |<count>| instances, its limit",
                "No room for another instance.",
                "Look for what registers without end; split the mesh in two.",
            ),
            Status(
                "RESOURCE_EXHAUSTED",
                "the instances of |<service>| would exceed |<count>| bytes, the limit of a service",
                "No room in this service.",
                "Shorten the labels (`MESH_METADATA`).",
            ),
            Status(
                "RESOURCE_EXHAUSTED",
                "the instances of all services would exceed |<count>| bytes, the registry's limit",
                "No room in the registry.",
                "Shorten the labels (`MESH_METADATA`).",
            ),
            Status(
                "RESOURCE_EXHAUSTED",
                "the registry has the configs of |<count>| services, its limit",
                "No room for another service's config.",
                "Remove configs that aren't used: set them to an empty text.",
            ),
            Status(
                "RESOURCE_EXHAUSTED",
                "all service configs would exceed |<count>| bytes, the registry's limit",
                "No room for this config.",
                "As above.",
            ),
            Status(
                "RESOURCE_EXHAUSTED",
                "<count>| service configs are being set, the registry's limit; try again",
                "Too many `SetServiceConfig` calls at once.",
                "Try again.",
            ),
            Status(
                "RESOURCE_EXHAUSTED",
                "the watcher read nothing for |<seconds>| s; watch again",
                "The client of a `Watch` doesn't read its messages.",
                "Watch again. Mesh clients do.",
            ),
            Status(
                "INTERNAL",
                "the registry can't save the config (|<text>|); keeping the previous one",
                "Writing into the state folder failed.",
                "Look at the disk and the folder's permissions.",
            ),
            Status(
                "UNAVAILABLE",
                "the registry is shutting down",
                "The registry was told to stop; its streams end.",
                "Nothing: clients keep their endpoints and try again.",
            ),
        ),
    ),
}

HEAD = """\
<!-- Written by docs/generate.py from docs/statuses.py, whose texts a test holds to the code. -->
# Statuses and messages

Every status that the mesh itself makes, with its cause and remedy. What varies is in angle brackets. A status with
other words comes from a handler, from another server, or from gRPC core, and the mesh hands it on as it is. Messages
are for people and may change between releases: programs decide by the code.

`explain()` on a call or an error says more: each attempt, its endpoint, when it began and how it ended.

Some things end no call, and so have no status: a retry that the budget doesn't allow (the call fails with its last
attempt's status), a hedge that the budget doesn't allow, and an ejected endpoint (calls go to others; when too many are
ejected, the ejections are ignored and `explain()` says `panic`).
"""


def page() -> str:
    """The text of docs/statuses.md."""
    lines = [HEAD.rstrip()]
    for title, (about, statuses) in STATUSES.items():
        lines.append(f"\n## {title}")
        if about:
            lines.append(textwrap.fill(about, 120, break_on_hyphens=False))
        lines.append("\n| code | message | cause | remedy |\n|---|---|---|---|")
        lines.extend(
            f"| `{each.code}` | `{each.message.replace('|', '')}` | {each.cause} | {each.remedy} |" for each in statuses
        )
    return "\n".join(lines) + "\n"
