"""The command line: ``python -m services``."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from services.supervisor.plan import CannotRunError, Plan
from services.supervisor.screen import Screen, foreground
from services.supervisor.shop import CANNOT_RUN, Shop


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(CANNOT_RUN, f"{self.prog}: {message}\n")


def parse(arguments: Sequence[str] | None = None) -> Plan:
    """The plan from the command line."""
    parser = _Parser(prog="run-mesh", description="Runs the whole shop on this machine until Ctrl-C.")
    count = _whole_number(1, 100)
    parser.add_argument("--users", type=count, default=3, help="replicas of the user service (default: 3)")
    parser.add_argument("--orders", type=count, default=2, help="replicas of the order service (default: 2)")
    parser.add_argument(
        "--notifications", type=count, default=2, help="replicas of the notification service (default: 2)"
    )
    parser.add_argument(
        "--port",
        type=_whole_number(1, 65000),
        default=50050,
        help="the registry's port; the others follow it (default: 50050)",
    )
    parser.add_argument(
        "--data", type=Path, default=Path("data"), help="the folder for databases and logs (default: data)"
    )
    parsed = parser.parse_args(arguments)
    return Plan(parsed.users, parsed.orders, parsed.notifications, parsed.port, parsed.data)


def _whole_number(least: int, most: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
        return number

    return whole_number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the shop; returns the exit code."""
    plan = parse(arguments)
    os.umask(0o077)  # for all processes: their files hold names, emails and orders
    screen = Screen(Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 160))

    async def run() -> int:
        return await Shop(plan, screen).run()

    with foreground():
        try:
            return asyncio.run(run())
        except CannotRunError as error:
            print(f"run-mesh: {error}", file=sys.stderr)
            return CANNOT_RUN
        except TimeoutError as error:
            print(f"run-mesh: {error}", file=sys.stderr)
            return 1
