"""The pages of ListInstances (AIP-158).

A page token encodes the last instance listed. It grants no access: any caller may start anywhere.
"""

from __future__ import annotations

import base64

from mesh.registry.book import Book
from mesh.registry.checks import Violations
from mesh.registry.limits import MAX_PAGE, MAX_TEXT, PAGE_BYTES
from weft.mesh.v1 import registry_pb2 as pb

MAX_TOKEN = 16 * MAX_TEXT
"""The longest page token accepted: a service's name and an id of full length are shorter. Characters."""

_Position = tuple[str, str]  # a service and an instance's id


def page(book: Book, request: pb.ListInstancesRequest) -> pb.ListInstancesResponse | Violations:
    """The requested page, or what is wrong with the request."""
    if request.page_size < 0:
        return [("page_size", "must not be negative")]
    position = _read(request.page_token) if request.page_token else ("", "")
    if position is None or (request.page_token and request.service not in ("", position[0])):
        return [("page_token", "must be the next_page_token of a page of the same service")]
    count, limit = min(request.page_size or MAX_PAGE, MAX_PAGE), PAGE_BYTES
    response = pb.ListInstancesResponse(epoch=book.epoch, revision=book.revision)
    services = [request.service] if request.service else [name for name in book.services() if name >= position[0]]
    for service in services:
        after = position[1] if service == position[0] else ""
        found, more = book.page(service, after, limit, count)
        size = sum(instance.ByteSize() for instance in found)
        if response.instances and size > limit:  # page() returns at least one instance, whatever its size
            found, more = (), True
        response.instances.extend(found)
        count, limit = count - len(found), limit - size
        if more:
            last = response.instances[-1]
            response.next_page_token = _token((last.service, last.id))
            break
    return response


def _token(position: _Position) -> str:
    return base64.urlsafe_b64encode("\0".join(position).encode()).decode()


def _read(token: str) -> _Position | None:
    if len(token) > MAX_TOKEN:
        return None
    try:
        service, _, instance_id = base64.b64decode(token, altchars=b"-_", validate=True).decode().partition("\0")
    except ValueError:  # not base64, or not UTF-8
        return None
    return (service, instance_id) if service and instance_id else None
