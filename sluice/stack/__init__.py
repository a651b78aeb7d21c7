"""Real servers and services on one machine, without containers: what `./dev` and the tests run."""

from sluice.stack.errors import StackError
from sluice.stack.services import SERVICES, Service
from sluice.stack.stack import Stack

__all__ = ["SERVICES", "Service", "Stack", "StackError"]


def main() -> None:
    """Entry point of `sluice-stack`."""
    from sluice.stack.command_line import main as run  # the command line needs Stack, which is made here

    run()
