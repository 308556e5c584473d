"""nats-py's client, hardened for a broker where anybody may publish."""

from __future__ import annotations

import re
from typing import Any

import structlog
from nats.aio.client import Client
from nats.protocol import parser

log = structlog.stdlib.get_logger()

# The broker accepts every character but these four in a subject; nats-py ends a subject at others, too (a form feed).
for _name in ("MSG_RE", "HMSG_RE"):
    _pattern = getattr(parser, _name).pattern.replace(rb"[^\s]", rb"[^ \t\r\n]")
    setattr(parser, _name, re.compile(_pattern))


class HardenedClient(Client):
    """Survives messages whose subject or headers can't be decoded. nats-py closes the connection over them, and the
    broker would then deliver them again and again."""

    closing = False
    """Whether this process is closing the connection."""

    def _build_message(self, sid: int, subject: bytes, *rest: Any) -> Any:
        return super()._build_message(sid, subject.decode(errors="replace").encode(), *rest)

    async def _process_headers(self, headers: bytes) -> dict[str, str] | None:
        try:
            parsed: dict[str, str] | None = await super()._process_headers(headers)
        except Exception:
            return None  # then it is not a CloudEvent
        return parsed

    async def on_disconnected(self) -> None:
        if not self.closing:
            log.warning("broker disconnected; reconnecting")

    async def on_reconnected(self) -> None:
        log.info("broker reconnected")

    async def on_error(self, error: Exception) -> None:
        log.debug("broker connection error", error=str(error))
