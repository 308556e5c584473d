"""``make bench-events``: how long it takes from a change of an order to the user's notification.

Everything is real: two order and two notification replicas, NATS with its store on disk, SQLite. Orders arrive at
random times, 100 per second on average (``--rate``). What is measured is the time between the transaction that writes
an event to the outbox and the one that writes the notification, all on one machine's clock.
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

TARGET = 250.0
"""The target for the 99th percentile, in milliseconds."""


@contextmanager
def shop(data: Path) -> Iterator[str]:
    """Run a shop with this data folder; yields its registry's address."""
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
            raise RuntimeError(f"the shop did not start: {said}")
        yield f"127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate()


def delays(database: Path) -> list[float]:
    """Milliseconds from event to notification, sorted."""
    with closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT event_time, create_time FROM notifications").fetchall()
    return sorted(
        (dt.datetime.fromisoformat(created) - dt.datetime.fromisoformat(happened)).total_seconds() * 1000
        for happened, created in rows
    )


def wait_for_empty_outbox(data: Path, within: float = 60.0) -> None:
    """Wait until the outbox is empty."""
    end = time.monotonic() + within
    with closing(sqlite3.connect(data / "order.db")) as connection:
        while connection.execute("SELECT count(*) FROM outbox").fetchone() != (0,):
            if time.monotonic() > end:
                raise TimeoutError(f"the outbox is not empty after {within:g} s")
            time.sleep(0.1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print a table; returns 0."""
    parser = argparse.ArgumentParser(prog="benchmarks.events", description="From the outbox to the notification.")
    parser.add_argument("--rate", type=float, default=100.0, help="orders per second (default: 100)")
    parser.add_argument("--for", type=float, default=30.0, dest="seconds", help="seconds (default: 30)")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        with shop(data) as registry:
            warm, load = (Load(registry, given.rate, random.Random(seed), mix={"create order": 1}) for seed in (1, 2))
            asyncio.run(warm.run(3))
            wait_for_empty_outbox(data)
            before = len(delays(data / "notification.db"))
            asyncio.run(load.run(given.seconds))
            wait_for_empty_outbox(data)
        taken = delays(data / "notification.db")
    orders = load.stats["create order"]
    print(
        f"{len(orders.latencies)} orders in {given.seconds:g} s (failed: {dict(orders.failures) or 'none'}), "
        f"created within {1000 * orders.quantile(0.5):.1f} ms (p50), {1000 * orders.quantile(0.99):.1f} ms (p99); "
        f"{len(taken) - before} notifications"
    )
    rows = [
        Row("outbox to notification, p50", f"{given.rate:g} orders per second", taken[len(taken) // 2], TARGET, "ms"),
        Row(
            "outbox to notification, p99",
            f"{given.rate:g} orders per second",
            taken[len(taken) * 99 // 100],
            TARGET,
            "ms",
        ),
        Row("outbox to notification, max", f"{given.rate:g} orders per second", taken[-1], 4 * TARGET, "ms"),
    ]
    table("Events", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
