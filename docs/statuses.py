"""The statuses that the mesh itself makes, for docs/statuses.md.

``tests/packaging/test_docs_statuses.py`` compares the table with the code: each message is in mesh/, each status that
mesh/ creates is listed here, and many of them are produced by real clients, servers and registries.
"""

from __future__ import annotations

import textwrap
from typing import NamedTuple


class Status(NamedTuple):
    """``message``: variable parts are in angle brackets; a bar marks where the code joins two texts. ``code``: the name
    of a gRPC status code, or of an exception."""

    code: str
    message: str
    cause: str
    remedy: str


STATUSES: dict[str, tuple[str, tuple[Status, ...]]] = {
    "No endpoint to call": (
        (
            "`<target>` is the channel's target; a list of addresses is cut to the first two. Nothing was sent for "
            "these calls. An error names at most three endpoints, those with a known cause first."
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
                "The endpoint can't be called, and gRPC core gives no cause.",
                "Check the server.",
            ),
            Status(
                "UNAVAILABLE",
                "<target>|: |<address>|: |health check of |<service>| returned |<status>",
                "The endpoint is connected but reports that it isn't serving: it is starting or draining, or has no "
                "health status for this service.",
                "Check the server: its `ready` hook may be waiting for something. For a server without the mesh, set "
                "`healthCheckConfig` to the service whose health it reports.",
            ),
            Status(
                "UNAVAILABLE",
                "<target>|: |<address>|: |health check returned |<status>",
                "The same, for the health of the whole server.",
                "Check the server.",
            ),
            Status(
                "UNAVAILABLE",
                "<target>|: |<address>|: |health check failed: |<code>|: |<text>",
                "The endpoint ended the health watch, and another health check failed with this status.",
                "Check the server.",
            ),
            Status(
                "UNAVAILABLE",
                "<target>|: |registry |<address>| has no instances of |<service>|; known services: |<services>",
                "The registry responded, and no instance of this service is registered.",
                "Correct the name in the target, or start the service with `MESH_REGISTRY`.",
            ),
            Status(
                "UNAVAILABLE",
                "<target>|: |registry |<address>| has no instances of |<service>|; known services: none",
                "The registry responded, and no instance of any service is registered.",
                "Start the services, or correct `MESH_REGISTRY`: it may be another registry.",
            ),
            Status(
                "UNAVAILABLE",
                "<target>|: |registry |<address>|: |<code>|: |<text>",
                "The registry refuses connections, and the client has no endpoints from before.",
                "Start the registry or correct its address. With `MESH_CACHE` a client starts without it.",
            ),
            Status(
                "UNAVAILABLE",
                "<target>|: |registry |<address>|: |no response within |<seconds>| s",
                "The registry doesn't respond, the client has no endpoints from before, and the call's deadline "
                "passed.",
                "Check the registry and the network.",
            ),
            Status(
                "UNAVAILABLE",
                "<target>|: |dns: |<host>|: |<text>",
                "The name has no addresses (the call fails at once), or the DNS server doesn't respond (it fails at "
                "its deadline).",
                "Correct the name, or check the DNS server.",
            ),
            Status(
                "UNAVAILABLE",
                "<target>|: |dns: |<host>| is not a name: |<text>",
                "The target's host isn't a valid host name.",
                "Correct the target.",
            ),
            Status(
                "UNAVAILABLE",
                "<target>|: |no endpoints",
                "The resolver returned an empty list without a reason.",
                "Check the source of the target's addresses.",
            ),
            Status(
                "UNAVAILABLE",
                "<target>|: |<task>| failed: |<exception>|: |<text>|; retrying in |<seconds>| s",
                "The mesh's own task that finds endpoints or connects to them (`discovery`, `connecting`) raised an "
                "exception. The log has the traceback; the task is restarted.",
                "Report it, with the traceback.",
            ),
            Status(
                "UNAVAILABLE",
                "the connection was lost before the call was sent",
                "Endpoints were READY, but whenever the call was about to be sent, the connection was lost. The mesh "
                "tried other endpoints, with delays, before it gave up.",
                "Find out why connections break: a proxy or load balancer with short limits, or servers that restart.",
            ),
        ),
    ),
    "Deadlines": (
        (
            "gRPC core's own “Deadline Exceeded” means that the call was sent to a server, which didn't respond in "
            "time. The mesh's messages say what else the call waited for."
        ),
        (
            Status(
                "DEADLINE_EXCEEDED",
                "<target>|: |<ready>| of |<all>| endpoints connected| after |<seconds>| s|: |<address>|: |<cause>",
                "The call waits for ready, and no endpoint could be called before its deadline. Nothing was sent.",
                "See the causes above.",
            ),
            Status(
                "DEADLINE_EXCEEDED",
                "<target>|: |<ready>| of |<all>| endpoints connected| after |<seconds>| s|: |<address>| |<state>| for "
                "|<seconds>| s",
                "The call waited until its deadline for an endpoint to connect. Nothing was sent.",
                "Check the endpoints that are CONNECTING: hosts may drop packets, servers may be out of threads.",
            ),
            Status(
                "DEADLINE_EXCEEDED",
                "<target>|: |<text>| after |<seconds>| s",
                "The call waits for ready, and no endpoint was known before its deadline; the text is one of those "
                "above.",
                "As above.",
            ),
            Status(
                "DEADLINE_EXCEEDED",
                "<target>|: |<source>| has not answered| for |<seconds>| s",
                "The call's deadline passed before the first response from the registry or DNS.",
                "Check the registry or the DNS server, or give the first calls more time.",
            ),
            Status(
                "DEADLINE_EXCEEDED",
                "the deadline had passed before the call was sent",
                "The call was made with a timeout of 0 or less, or in a handler whose inbound call has no time left.",
                "Check `mesh.remaining()` before long work. Make calls that must outlive the inbound call inside "
                "`with mesh.detach():`.",
            ),
            Status(
                "DEADLINE_EXCEEDED",
                "<target>|: not sent within |<seconds>| s; ready endpoints: |<count>",
                "Endpoints were READY, but the deadline passed before the call could be sent: the process is busy, or "
                "connections broke.",
                "Give the process more CPU, or the call more time.",
            ),
            Status(
                "DEADLINE_EXCEEDED",
                "no response within the attempt timeout of |<seconds>| s",
                "The last attempt exceeded `attemptTimeout`. (Such attempts are retried as far as the retry policy "
                "and the deadline allow.)",
                "Raise `attemptTimeout`, or check the endpoint that `explain()` names.",
            ),
            Status(
                "DEADLINE_EXCEEDED",
                "no response within perAttemptRecvTimeout, |<seconds>| s",
                "The last attempt had no response within this time.",
                "Raise `perAttemptRecvTimeout`, or check the endpoint.",
            ),
        ),
    ),
    "Calls that the client refuses": (
        "They reach no endpoint, count against none, and are never retried.",
        (
            Status(
                "UNAVAILABLE",
                "refused by the client: |<count>| calls are outstanding, and the limit for |<criticality>| calls is "
                "|<count>| (overload.maxOutstanding in the service config)",
                "More calls are in flight or waiting than `overload.maxOutstanding` allows for their criticality.",
                "Find out why they pile up (a slow service, calls without deadlines), or raise the limit.",
            ),
            Status(
                "RESOURCE_EXHAUSTED",
                "refused by the client: the service refuses |<criticality>| calls, so |<share>| of them aren't sent",
                "`overload.adaptiveThrottle` is on, and the service refused more than half of what was sent to it.",
                "Add capacity to the service. Once it accepts calls, the throttle lets them through again.",
            ),
        ),
    ),
    "Calls that end in the client": (
        "",
        (
            Status(
                "CANCELLED",
                "Locally cancelled by application!",
                "The program cancelled the call, or the inbound call that it was made for was cancelled.",
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
                "The process was forked while the call was in flight: it only continues in the parent.",
                "See [forking.md](forking.md).",
            ),
            Status(
                "INTERNAL",
                "Invalid metadata",
                "A key or a value of the call's metadata can't be sent: keys must be lower case, values must be "
                "printable ASCII unless the key ends in `-bin`.",
                "Correct the metadata.",
            ),
            Status(
                "INTERNAL",
                "<exception>|: |<text>",
                "The mesh itself raised an exception while it handled the call.",
                "Report it.",
            ),
        ),
    ),
    "Only in `explain()`": (
        "Attempts that end like this don't decide the status of their call.",
        (
            Status("CANCELLED", "another attempt answered first", "A hedge lost the race.", "Nothing to do."),
            Status(
                "CANCELLED",
                "the call was cancelled",
                "The attempt was running when its call was cancelled.",
                "Nothing to do.",
            ),
            Status(
                "CANCELLED",
                "interrupted",
                "An exception such as KeyboardInterrupt ended a blocking call; the caller gets that exception.",
                "Nothing to do.",
            ),
        ),
    ),
    "Exceptions that a client raises": (
        (
            "They are raised at once, where the channel is created or the call is made. Arguments of the wrong type "
            "raise TypeError and invalid targets ValueError, with a message that says what is expected."
        ),
        (
            Status(
                "ValueError",
                "Cannot invoke RPC on closed channel!",
                "A call was made on a closed channel.",
                "Keep the channel open as long as its stubs are in use.",
            ),
            Status(
                "ValueError",
                "target |<target>|: no registry; set |<variable>|=host:port, or write mesh://host:port/|<service>",
                "The target is `mesh:///…`, and `MESH_REGISTRY` isn't set.",
                "Set it before the channel is created.",
            ),
            Status(
                "ValueError",
                "target |<target>|: unknown scheme |<scheme>|; known: |<schemes>|, and host:port",
                "The target has a scheme that neither the mesh nor gRPC knows.",
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
                "An asyncio channel is used on a different loop than its first call.",
                "Create a channel for each loop (for each `asyncio.run`).",
            ),
        ),
    ),
    "Refusals of a server": (
        (
            "The handler wasn't called, except for streams that a drain ends. Those marked * have a pushback "
            "(`grpc-retry-pushback-ms`), which says when to retry. [overload.md](overload.md) says when each occurs."
        ),
        (
            Status(
                "UNAVAILABLE",
                "not ready yet",
                "The `ready` hook of the server's settings hasn't returned true. *",
                "Wait; if that takes too long, check what the hook waits for.",
            ),
            Status(
                "UNAVAILABLE",
                "shutting down",
                "The server is draining: the call arrived too late, or the stream was still open after "
                "`MESH_STREAM_GRACE`. *",
                "Retry; mesh clients do so on another endpoint, if the method may be retried. Resume streams.",
            ),
            Status(
                "RESOURCE_EXHAUSTED",
                "overloaded: |<method>| is limited to |<count>| at a time| and the call waited for |<milliseconds>| ms",
                "Calls of this method miss their deadlines because of load, so the server limits it. *",
                "Add replicas, or check what the handler waits for.",
            ),
            Status(
                "RESOURCE_EXHAUSTED",
                "overloaded: calls miss their deadlines in the queue| and the call waited for |<milliseconds>| ms",
                "All permits are in use, and calls that wait for one miss their deadlines. *",
                "Add replicas, or raise `MESH_MAX_CONCURRENCY` (`MESH_MAX_WORKERS` on threads) if the CPU is idle.",
            ),
            Status(
                "RESOURCE_EXHAUSTED",
                "overloaded: the queue is full| (MESH_QUEUE_SIZE=|<count>|)",
                "More than `MESH_QUEUE_SIZE` calls are queued. *",
                "Find handlers that hang; set deadlines on calls.",
            ),
            Status(
                "RESOURCE_EXHAUSTED",
                "too many streams are open| (MESH_MAX_STREAMS=|<count>|)",
                "More than `MESH_MAX_STREAMS` streams are open, or more than a threaded server has threads for. *",
                "Close unused streams, raise the limit, or use an asyncio server.",
            ),
            Status(
                "DEADLINE_EXCEEDED",
                "overloaded: less time is left than the method takes",
                "Calls have missed their deadlines in the queue, and this one has less time left than 1.5 times its "
                "method's median duration.",
                "Add replicas, or give the calls more time.",
            ),
            Status(
                "DEADLINE_EXCEEDED",
                "the deadline passed before the handler started",
                "The call waited in the queue until its deadline, or arrived too late.",
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
                "The handler raised an exception. Its text may be confidential, so the caller only gets an id; an "
                "ERROR of the logger `mesh.server` has the same id and the traceback.",
                "Search the server's log for the id. To return a status of your own, use `context.abort`.",
            ),
            Status(
                "INVALID_ARGUMENT",
                "the request's bytes are not a message of the method's request type",
                "The caller's stub was generated from another proto, or the request is corrupt.",
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
                "`Check` was called for a service that isn't served here; `grpc.health.v1` specifies this status.",
                "Use a service's full name, or “” for the whole server.",
            ),
            Status(
                "UNAVAILABLE",
                "the server is shutting down",
                "A health watch ends because its asyncio server or registry is draining.",
                "Nothing to do.",
            ),
            Status(
                "UNIMPLEMENTED",
                "with interceptors on the server, each of these streams holds a thread; the limit is reached",
                "A threaded server whose interceptors rebuild handlers has no threads left for further health watches "
                "and load reports. Clients then treat it as healthy (A17).",
                "See [instrumentation.md](instrumentation.md).",
            ),
        ),
    ),
    "Errors of the registry": (
        (
            "The message of INVALID_ARGUMENT starts with the path of the field, and names all invalid fields; with "
            "grpcio-status it also has `BadRequest` details. Limits are in [limits.md](limits.md)."
        ),
        (
            Status(
                "INVALID_ARGUMENT",
                '<field>|: |must be a service\'s full name, such as "weft.user.v1.UserService"',
                "The service's name is empty, too long or invalid.",
                "Use the full name from the proto: package and service.",
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
                "<field>|: |contains an unprintable character",
                "It could disguise the text in logs and terminals.",
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
                "The service config is invalid at this path. The previous one stays in effect.",
                "Correct it; [service-config.md](service-config.md) has every key.",
            ),
            Status(
                "INVALID_ARGUMENT",
                "<field>|: |must not be negative",
                "`page_size` is below 0.",
                "Omit it, or set it to 1 or more.",
            ),
            Status(
                "INVALID_ARGUMENT",
                "<field>|: |must be the next_page_token of a page of the same service",
                "The token isn't one of the registry's, or belongs to another list request.",
                "Start again without a token.",
            ),
            Status(
                "RESOURCE_EXHAUSTED",
                "the registry already has |<count>| instances, its limit",
                "No room for another instance.",
                "Find out what keeps registering instances, or split the mesh in two.",
            ),
            Status(
                "RESOURCE_EXHAUSTED",
                "the instances of |<service>| would exceed |<count>| bytes, the limit for a service",
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
                "the registry already has configs for |<count>| services, its limit",
                "No room for another service's config.",
                "Remove unused configs by setting them to an empty string.",
            ),
            Status(
                "RESOURCE_EXHAUSTED",
                "all service configs would exceed |<count>| bytes, the registry's limit",
                "No room for this config.",
                "As above.",
            ),
            Status(
                "RESOURCE_EXHAUSTED",
                "<count>| service configs are already being set, the registry's limit; try again",
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
                "Check the disk and the folder's permissions.",
            ),
            Status(
                "UNAVAILABLE",
                "the registry is shutting down",
                "The registry is stopping, and its streams end.",
                "Nothing to do: clients keep their endpoints and reconnect.",
            ),
        ),
    ),
}

HEAD = """\
<!-- Written by docs/generate.py from docs/statuses.py, whose texts a test holds to the code. -->
# Statuses and messages

Every status that the mesh itself produces, with cause and remedy. Variable parts are in angle brackets. A status with
any other message comes from a handler, from another server, or from gRPC core, and the mesh passes it on unchanged.
Messages are for people and may change between releases: programs should use the status code.

`explain()` on a call or an error has more: each attempt, its endpoint, when it started and how it ended.

Some events don't end a call and have no status: a retry that the budget doesn't allow (the call fails with its last
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
