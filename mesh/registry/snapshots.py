"""What a watch sends: snapshots, in parts of bounded size, and deltas."""

from __future__ import annotations

from collections.abc import Iterator

from mesh.registry.book import Book, Delta
from mesh.registry.limits import MAX_PARTS, WATCH_MESSAGE_BYTES
from weft.mesh.v1 import registry_pb2 as pb


class Snapshots:
    """The messages of watches. ``parts``: the current parts of watched services' snapshots, by the id before each; all
    watchers of a service share them until it changes."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self.parts: dict[str, dict[str, tuple[pb.WatchResponse, bool]]] = {}

    def forget(self, service: str) -> None:
        """The service has changed, or nobody watches it any more."""
        self.parts.pop(service, None)

    def snapshot(self, service: str) -> Iterator[pb.WatchResponse]:
        """All instances of a service: one message, or parts, completed by the delta that follows them.

        Each part is read from the book when it is sent.
        """
        after, is_last = "", False
        while not is_last:
            parts = self.parts.setdefault(service, {})
            found = parts.get(after)
            if found is None:
                if len(parts) >= MAX_PARTS:
                    parts.clear()
                found = parts[after] = self._part(service, after)
            message, is_last = found
            yield message
            if not is_last:
                after = (message.delta.upserted if after else message.snapshot.instances)[-1].id

    def delta(self, delta: Delta) -> pb.WatchResponse:
        """The message for a delta."""
        message = pb.WatchResponse(epoch=self._book.epoch, revision=delta.revision)
        message.delta.CopyFrom(
            pb.Delta(upserted=delta.upserted, removed_ids=delta.removed_ids, service_config=delta.config)
        )
        return message

    def _part(self, service: str, after: str) -> tuple[pb.WatchResponse, bool]:
        """The part of a snapshot with the instances after the id ``after``, and whether it is the last. The first part
        has the config, too."""
        config = "" if after else self._book.config(service)
        instances, more = self._book.page(service, after, WATCH_MESSAGE_BYTES - len(config.encode()))
        # With revision 0 a watcher that is cut off between parts starts again.
        message = pb.WatchResponse(epoch=self._book.epoch, revision=0 if after or more else self._book.revision)
        message.more = bool(after) or more
        if after:
            message.delta.upserted.extend(instances)
        else:
            message.snapshot.CopyFrom(pb.Snapshot(instances=instances, service_config=config))
        return message, not more
