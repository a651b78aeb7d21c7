"""The stack from the command line: `up`, `run COMMAND`, `down`."""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from sluice.stack.errors import StackError
from sluice.stack.process import MARK
from sluice.stack.server import Server
from sluice.stack.services import SERVICES, Service
from sluice.stack.stack import Stack, say


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit: 0 when all went well, 1 with the reason when not."""
    parser = argparse.ArgumentParser(prog="sluice-stack", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start servers and services, stay until Ctrl-C")
    up.add_argument("--servers", action="store_true", help="only the servers")
    up.add_argument("--workers", type=int, default=1, metavar="N", help="processes of each worker (1)")
    run = commands.add_parser("run", help="run a command with servers of its own, on other ports and other data")
    run.add_argument("--fast", action="store_true", help="PostgreSQL without fsync, for tests")
    run.add_argument("argv", nargs=argparse.REMAINDER, metavar="COMMAND ...")
    down = commands.add_parser("down", help="stop what a killed `up` left behind")
    down.add_argument("--purge", action="store_true", help="delete all data, too")
    options = parser.parse_args(argv)
    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if ending != signal.SIGHUP or signal.getsignal(ending) != signal.SIG_IGN:  # nohup stays nohup
            signal.signal(ending, _interrupt)
    try:
        match options.command:
            case "up":
                sys.exit(_up(services=not options.servers, workers=options.workers))
            case "run":
                sys.exit(_run(options.argv, fast=options.fast))
            case _:
                sys.exit(_down(purge=options.purge))
    except StackError as error:
        say(f"sluice: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _up(*, services: bool, workers: int) -> int:
    stack = Stack(default_ports=True)
    try:
        stack.start()
        environment = {"SLUICE_ADMIN_USERNAME": "admin", "SLUICE_ADMIN_PASSWORD": stack.home.secret("admin")}
        if services:
            for name in SERVICES:
                stack.spawn(name, workers if name.endswith("worker") else 1, environment)
            for service in stack.services:
                say(f"waiting for {service.name} on {service.url} ...")
                service.wait_ready()
        _introduce(stack, environment)
        _supervise(stack)
    except KeyboardInterrupt:
        say("stopping ...")
    finally:
        stack.stop()
    return 0


def _introduce(stack: Stack, admin: dict[str, str]) -> None:
    found = stack.environment()
    lines = {
        "PostgreSQL": found["SLUICE_POSTGRES_DSN"],
        "RabbitMQ": found["SLUICE_AMQP_URL"],
        "RabbitMQ console": found.get("SLUICE_RABBITMQ_MANAGEMENT_URL", "not ours"),
        "S3": found["SLUICE_S3_ENDPOINT"],
        "S3 access key": found["SLUICE_S3_ACCESS_KEY"],
        "S3 secret key": found["SLUICE_S3_SECRET_KEY"],
        "logs": str(stack.home.logs),
    }
    gateways = [service.url for service in stack.services if service.name.startswith("gateway")]
    if gateways:
        password = admin["SLUICE_ADMIN_PASSWORD"]
        lines = {"gateway": gateways[0], "gateway login": f"admin / {password}", **lines}
    print()
    for title, value in lines.items():
        print(f"  {title:<17} {value}")
    print("\nCtrl-C stops everything; the data stays.", flush=True)


def _supervise(stack: Stack) -> NoReturn:
    """Start again whatever ends, at most once in five seconds each, until interrupted."""
    ended_at: dict[str, float] = {}
    while True:
        time.sleep(0.5)
        running: list[Server | Service] = [*stack.servers, *stack.services]
        for one in running:
            name, process = one.process.name, one.process
            if process.is_running() or time.monotonic() < ended_at.get(name, 0.0) + 5:
                continue
            ended_at[name] = time.monotonic()
            say(f"{name} ended with status {process.exit_status} and is started again; see {process.log}")
            if not isinstance(one, Service):
                one.stop()  # what is left of it
            one.start()


def _run(argv: list[str], *, fast: bool) -> int:
    if argv[:1] == ["--"]:
        argv = argv[1:]
    if not argv:
        raise StackError("run what? `sluice-stack run -- COMMAND ...`")
    stack = Stack.temporary(fast=fast)
    try:
        stack.start()
        child = subprocess.Popen(argv, env={**os.environ, **stack.environment(), MARK: str(stack.home.path)})
        try:
            return child.wait()
        except KeyboardInterrupt:
            # The terminal sent Ctrl-C to the command as well; SIGTERM and SIGHUP came to us alone.
            child.terminate()
            child.wait()
            raise
    finally:
        stack.purge()


def _down(*, purge: bool) -> int:
    stack = Stack()
    if purge:
        stack.purge()
        say(f"stopped, and deleted {stack.home.path} and {stack.postgres.folder}")
    else:
        stack.home.lock()
        stack.stop()
        say(f"stopped; the data stays in {stack.home.path} and {stack.postgres.folder}")
    return 0


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
