"""The replay buffer of a streaming call: what it sent is kept so that another attempt can send it again (A6).

The caller's requests are taken once, by the first attempt that needs the next one, and serialized once, so that all
attempts send the same bytes and their size is known. Beyond ``LIMIT`` the attempt that sent them is committed; after
the commit nothing more is kept.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import Any

LIMIT = 256 * 1024
"""The most that is buffered of a call's requests, unary or streaming, as in gRPC core's retry buffer. Bytes."""


class Request:
    """One request of a stream, serialized when it is first sent."""

    __slots__ = ("_bytes", "_message", "_replay")

    def __init__(self, message: Any, replay: Buffer) -> None:
        self._message = message
        self._replay = replay
        self._bytes: bytes | None = None

    def serialized(self) -> bytes:
        """The request's bytes. Raises what the caller's serializer raises."""
        if self._bytes is None:
            serializer = self._replay.serializer
            self._bytes = self._message if serializer is None else serializer(self._message)
            self._replay.count(len(self._bytes))
        return self._bytes


class Buffer:
    """The requests that were taken and may have to be sent again."""

    def __init__(self, serializer: Callable[[Any], bytes] | None, on_overflow: Callable[[], None]) -> None:
        self.serializer = serializer
        self._on_overflow = on_overflow
        self._kept: list[Request] = []
        self._size = 0
        self.overflowed = False
        self._released = False
        self._error: BaseException | None = None  # how the caller's requests ended: StopIteration, or what they raised

    def count(self, size: int) -> None:
        """Count ``size`` more bytes sent."""
        if not self._released:
            self._size += size
            if self._size > LIMIT:
                self.overflowed = True
                self._on_overflow()

    def release(self) -> None:
        """An attempt was committed: what it sent is not needed again."""
        self._released = True

    def _at(self, index: int) -> Request | None:
        """The request at ``index``, if it was already taken. Raises what the caller's iterator raised."""
        if index < len(self._kept):
            return self._kept[index]
        if self._error is not None and not isinstance(self._error, StopIteration):
            raise self._error
        return None

    def _take(self, message: Any) -> Request:
        request = Request(message, self)
        if not self._released:
            self._kept.append(request)
        return request


class Replay(Buffer):
    """Requests of a blocking iterator. Each attempt reads them from the start, in its own thread (grpc's)."""

    def __init__(
        self, requests: Iterable[Any], serializer: Callable[[Any], bytes] | None, on_overflow: Callable[[], None]
    ) -> None:
        super().__init__(serializer, on_overflow)
        try:
            self._requests = iter(requests)
        except TypeError as error:
            self._error = error  # raised in each attempt; grpc ends the call with it
        self._taking = threading.Lock()  # one attempt at a time waits for the caller's next request

    def requests(self) -> Iterator[Request]:
        """All requests from the start, for one attempt."""
        index = 0
        while True:
            with self._taking:
                request = self._at(index)
                if request is None:
                    if self._error is not None:
                        return
                    try:
                        request = self._take(next(self._requests))
                    except BaseException as error:
                        self._error = error
                        if isinstance(error, StopIteration):
                            return
                        raise
            index += 1
            yield request


class AioReplay(Buffer):
    """Requests of an iterable, asynchronous or not, or of ``write``. Each attempt reads them from the start."""

    def __init__(
        self,
        requests: AsyncIterable[Any] | Iterable[Any] | None,
        serializer: Callable[[Any], bytes] | None,
        on_overflow: Callable[[], None],
    ) -> None:
        super().__init__(serializer, on_overflow)
        self._written = _WriteQueue() if requests is None else None
        source = requests if self._written is None else self._written
        self._next: Callable[[], Awaitable[Any]]
        if isinstance(source, AsyncIterable):
            self._next = aiter(source).__anext__
        else:
            try:
                self._next = _asynchronous(iter(source or ()))
            except TypeError as error:
                self._error = error  # raised in each attempt; grpc ends the call with it
        self._taking = asyncio.Lock()
        self._fetching: asyncio.Future[Any] | None = None

    async def requests(self) -> AsyncIterator[Request]:
        """All requests from the start, for one attempt."""
        index = 0
        while True:
            async with self._taking:
                request = self._at(index)
                if request is None:
                    if self._error is not None:
                        return
                    try:
                        request = self._take(await self._fetch())
                    except StopAsyncIteration:
                        self._error = StopIteration()
                        return
                    except Exception as error:
                        self._error = error
                        raise
            index += 1
            yield request

    async def _fetch(self) -> Any:
        if self._released and self._fetching is None:
            return await self._next()
        # An attempt that is cancelled must not end the caller's iterator: the next attempt continues with it.
        if self._fetching is None:
            self._fetching = asyncio.ensure_future(self._next())
        try:
            return await asyncio.shield(self._fetching)
        finally:
            if self._fetching.done():
                self._fetching = None

    def close(self) -> None:
        """The call has ended: the caller's next request is not needed any more."""
        self.release()
        if self._written is not None:
            self._written.end()
        if self._fetching is not None:
            self._fetching.cancel()
        self._next = _no_more  # frees the caller's iterator even while the call object is kept

    @property
    def writable(self) -> bool:
        """Whether requests come from ``write``."""
        return self._written is not None

    def write(self, message: Any) -> asyncio.Future[None]:
        """Send ``message``; done when the running attempt is ready for the next one."""
        assert self._written is not None
        return self._written.put(message)

    def taken(self, written: asyncio.Future[None]) -> bool:
        """Whether an attempt has taken the message of this ``write``."""
        assert self._written is not None
        return self._written.taken(written)

    def done_writing(self) -> None:
        """No more requests follow."""
        assert self._written is not None
        self._written.end()


class _WriteQueue:
    """Requests from ``write``, one at a time: each waits until the previous one was sent."""

    def __init__(self) -> None:
        self._messages: deque[tuple[Any, asyncio.Future[None]]] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._sent: asyncio.Future[None] | None = None
        self._ended = False

    def __aiter__(self) -> _WriteQueue:
        return self

    async def __anext__(self) -> Any:
        if self._sent is not None and not self._sent.done():
            self._sent.set_result(None)  # asking for the next one means that the last one was sent
        while not self._messages:
            if self._ended:
                raise StopAsyncIteration
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        message, self._sent = self._messages.popleft()
        return message

    def put(self, message: Any) -> asyncio.Future[None]:
        sent = asyncio.get_running_loop().create_future()
        self._messages.append((message, sent))
        self._notify()
        return sent

    def taken(self, sent: asyncio.Future[None]) -> bool:
        return all(waiting is not sent for _, waiting in self._messages)

    def end(self) -> None:
        self._ended = True
        self._notify()

    def _notify(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


async def _no_more() -> Any:
    raise StopAsyncIteration


def _asynchronous(iterator: Iterator[Any]) -> Callable[[], Awaitable[Any]]:
    async def following() -> Any:
        try:
            return next(iterator)
        except StopIteration:
            raise StopAsyncIteration from None

    return following
