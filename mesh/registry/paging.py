"""The pages of ListInstances (AIP-158).

A token is the place of the last instance that was listed, and gives no access to anything: whoever may list may begin
anywhere.
"""

from __future__ import annotations

import base64

from mesh.registry.book import Book
from mesh.registry.checks import Violations
from mesh.registry.limits import MAX_PAGE, MAX_TEXT, PAGE_BYTES
from weft.mesh.v1 import registry_pb2 as pb

MAX_TOKEN = 16 * MAX_TEXT
"""The longest page token that is read: a service's name and an id at full length are shorter. Characters."""

_Place = tuple[str, str]  # a service and an instance's id


def page(book: Book, request: pb.ListInstancesRequest) -> pb.ListInstancesResponse | Violations:
    """The page that is asked for, or what is wrong with the request."""
    if request.page_size < 0:
        return [("page_size", "must not be negative")]
    place = _read(request.page_token) if request.page_token else ("", "")
    if place is None or (request.page_token and request.service not in ("", place[0])):
        return [("page_token", "must be the next_page_token of a page of the same service")]
    count, limit = min(request.page_size or MAX_PAGE, MAX_PAGE), PAGE_BYTES
    answer = pb.ListInstancesResponse(epoch=book.epoch, revision=book.revision)
    services = [request.service] if request.service else [name for name in book.services() if name >= place[0]]
    for service in services:
        after = place[1] if service == place[0] else ""
        found, more = book.page(service, after, limit, count)
        size = sum(instance.ByteSize() for instance in found)
        if answer.instances and size > limit:  # the first of a service comes alone, whatever its size
            found, more = (), True
        answer.instances.extend(found)
        count, limit = count - len(found), limit - size
        if more:
            last = answer.instances[-1]
            answer.next_page_token = _token((last.service, last.id))
            break
    return answer


def _token(place: _Place) -> str:
    return base64.urlsafe_b64encode("\0".join(place).encode()).decode()


def _read(token: str) -> _Place | None:
    if len(token) > MAX_TOKEN:
        return None
    try:
        service, _, instance_id = base64.b64decode(token, altchars=b"-_", validate=True).decode().partition("\0")
    except ValueError:  # also what is no base64, and no UTF-8
        return None
    return (service, instance_id) if service and instance_id else None
