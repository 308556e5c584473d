"""``make bench-events``: how long it takes from what happens to an order until its user is told.

Real processes throughout: two order and two notification replicas, NATS with its store on disk, SQLite. Orders come at
random, 100 a second on average (``--rate``); what is measured is the time between the transaction that writes an event
to the outbox and the one that writes the notification, by the clock of the one machine that all run on.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime as dt
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from benchmarks.harness import Row, table
from services.load import Load

REACH = 250.0
"""Milliseconds that the 99th percentile may take."""


@contextmanager
def shop(data: Path) -> Iterator[str]:
    """A running shop with its data there; yields the address of its registry."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = min(probe.getsockname()[1], 65000)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "services", "--port", str(port), "--data", str(data)),
            *("--users", "1", "--orders", "2", "--notifications", "2"),
        ],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    try:
        said = ""
        for line in process.stdout:
            said += line
            if line.startswith("Ready in"):
                break
        else:
            raise RuntimeError(f"no shop: {said}")
        yield f"127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate()


def delays(database: Path) -> list[float]:
    """Milliseconds from event to notification, in order of size."""
    with closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT event_time, create_time FROM notifications").fetchall()
    return sorted(
        (dt.datetime.fromisoformat(created) - dt.datetime.fromisoformat(happened)).total_seconds() * 1000
        for happened, created in rows
    )


def settled(data: Path, within: float = 60.0) -> None:
    """Wait until no event waits in the outbox."""
    end = time.monotonic() + within
    with closing(sqlite3.connect(data / "order.db")) as connection:
        while connection.execute("SELECT count(*) FROM outbox").fetchone() != (0,):
            if time.monotonic() > end:
                raise TimeoutError("the outbox doesn't empty")
            time.sleep(0.1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print a table; returns 0."""
    parser = argparse.ArgumentParser(prog="benchmarks.events", description="From the outbox to the notification.")
    parser.add_argument("--rate", type=float, default=100.0, help="orders a second (100)")
    parser.add_argument("--for", type=float, default=30.0, dest="seconds", help="seconds (30)")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        with shop(data) as registry:
            warm, load = (Load(registry, given.rate, random.Random(seed), mix={"buy": 1}) for seed in (1, 2))
            asyncio.run(warm.run(3))
            settled(data)
            before = len(delays(data / "notification.db"))
            asyncio.run(load.run(given.seconds))
            settled(data)
        taken = delays(data / "notification.db")
    orders = load.figures["buy"]
    print(
        f"{len(orders.took)} orders in {given.seconds:g} s (failed: {dict(orders.failed) or 'none'}), taken within "
        f"{1000 * orders.percentile(0.5):.1f} ms (p50), {1000 * orders.percentile(0.99):.1f} ms (p99); "
        f"{len(taken) - before} users told"
    )
    rows = [
        Row("outbox to notification, p50", f"{given.rate:g} orders a second", taken[len(taken) // 2], REACH, "ms"),
        Row(
            "outbox to notification, p99", f"{given.rate:g} orders a second", taken[len(taken) * 99 // 100], REACH, "ms"
        ),
        Row("outbox to notification, max", f"{given.rate:g} orders a second", taken[-1], 4 * REACH, "ms"),
    ]
    table("Events", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
