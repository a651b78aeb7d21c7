"""What every embedded server has in common."""

from abc import ABC, abstractmethod
from typing import ClassVar

from sluice.stack.home import Home
from sluice.stack.process import Process


class Server(ABC):
    """One server of a stack. `start` returns at once; `is_ready` tells when clients are answered."""

    title: ClassVar[str]
    process: Process

    def __init__(self, home: Home) -> None:
        self.home = home

    @abstractmethod
    def prepare(self) -> None:
        """Choose ports and credentials; called once per stack, before `start`."""

    @abstractmethod
    def start(self) -> None:
        """Start the process. Raises StackError when the program is missing."""

    @abstractmethod
    def is_ready(self) -> bool:
        """Tell whether a client would be answered now."""

    @abstractmethod
    def environment(self) -> dict[str, str]:
        """Return the SLUICE_* variables with which a service finds this server."""

    @property
    @abstractmethod
    def address(self) -> str:
        """Host and port, for people."""

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Wait until clients are answered; raises StackError with the end of the log."""
        self.process.wait_ready(self.is_ready, timeout)

    def restart(self) -> None:
        """Stop if it runs, start on the same port, and wait until it is ready."""
        self.stop()
        self.start()
        self.wait_ready()

    def stop(self) -> None:
        """Shut down in order; data stays. Idempotent."""
        self.process.stop()

    def kill(self) -> None:
        """SIGKILL to all of it, as a power cut would."""
        self.process.kill()

    def pause(self) -> None:
        """Freeze it: connections stay open and nothing answers."""
        self.process.pause()

    def resume(self) -> None:
        """End a pause."""
        self.process.resume()
