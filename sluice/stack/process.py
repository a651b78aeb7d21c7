"""One program in a session of its own, with a log file, and everything that it started."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from sluice.stack.errors import StackError

# Set in each process of a stack, to the folder of the stack. Whatever outlives a killed stack is found by it,
# with no list of pids that could go stale or name somebody else's process.
MARK = "SLUICE_STACK_HOME"


def server_environment(home: Path) -> dict[str, str]:
    """Return the little that a server needs to know of its caller's environment."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", MARK: str(home)}


class Process:
    """A program that is started, stopped, killed or frozen as a whole."""

    def __init__(self, name: str, log: Path, *, stop_signal: signal.Signals = signal.SIGTERM) -> None:
        self.name = name
        self.log = log
        self._stop_signal = stop_signal
        self._popen: subprocess.Popen[bytes] | None = None
        self._stopping = False

    @property
    def pid(self) -> int:
        """Process id; raises StackError before the first start."""
        return self._started().pid

    @property
    def exit_status(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self._started().poll()

    def is_running(self) -> bool:
        """Tell whether it was started and has not ended."""
        return self._popen is not None and self._popen.poll() is None

    def start(self, argv: Sequence[str | Path], *, env: Mapping[str, str], cwd: Path, user: str | None = None) -> None:
        """Start the program; output is appended to its log."""
        if self.is_running():
            raise StackError(f"{self.name} already runs (process {self.pid})")
        self._stopping = False
        with self.log.open("ab") as log:
            # A session of its own: Ctrl-C in the terminal reaches only us, and we stop things in order.
            self._popen = subprocess.Popen(
                [str(word) for word in argv],
                env=env,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                user=user,
                group=user,
                extra_groups=None if user is None else [],
            )

    def wait_ready(self, is_ready: Callable[[], bool], timeout: float) -> None:
        """Poll until ready; raises StackError with the end of the log when it ends or time is up."""
        deadline = time.monotonic() + timeout
        while not is_ready():
            if not self.is_running():
                trouble = f"ended with status {self.exit_status}"
            elif time.monotonic() > deadline:
                trouble = f"was not ready after {timeout:.0f} s"
            else:
                time.sleep(0.05)
                continue
            raise StackError(f"{self.name} {trouble}; the end of {self.log}:\n{self.log_tail()}")

    def request_stop(self) -> None:
        """Ask it to end, without waiting."""
        # Once: a second signal would tell some programs to skip their clean ending.
        if self.is_running() and not self._stopping:
            self._stopping = True
            self._started().send_signal(self._stop_signal)
            self.resume()

    def stop(self, timeout: float = 20.0) -> None:
        """Ask it to end and wait; what is left after `timeout` seconds is killed. Idempotent."""
        if self._popen is None:
            return
        tree = self._tree()
        self.request_stop()
        try:
            self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            print(f"{self.name} did not stop in {timeout:.0f} s and is killed", file=sys.stderr)
            self.kill()
        kill_all(tree[1:], patience=3.0)

    def kill(self) -> None:
        """SIGKILL to it and to all that it started; returns when they are gone."""
        if self._popen is None:
            return
        tree = self._tree()
        self._popen.kill()
        self._popen.wait()
        kill_all(tree[1:])

    def pause(self) -> None:
        """Freeze it and all that it started (SIGSTOP): alive, connected, and silent."""
        _send(signal.SIGSTOP, self._tree())

    def resume(self) -> None:
        """Let a frozen program go on."""
        _send(signal.SIGCONT, self._tree())

    def log_tail(self, lines: int = 30) -> str:
        """Return the end of its log."""
        if not self.log.exists():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _started(self) -> subprocess.Popen[bytes]:
        if self._popen is None:
            raise StackError(f"{self.name} was not started here")
        return self._popen

    def _tree(self) -> list[psutil.Process]:
        if not self.is_running():
            return []
        try:
            root = psutil.Process(self.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def kill_all(processes: Sequence[psutil.Process], *, patience: float = 0.0) -> None:
    """Wait `patience` seconds for the processes to end, kill the others, and see them gone."""
    _send(signal.SIGKILL, _wait(processes, patience))
    stuck = _wait(processes, 10.0)
    if stuck:
        raise StackError(f"could not kill {', '.join(str(process) for process in stuck)}")


def _send(what: signal.Signals, processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # ended meanwhile
            process.send_signal(what)


def _wait(processes: Sequence[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Return those that still run after so many seconds."""
    deadline = time.monotonic() + seconds
    while (alive := [process for process in processes if _runs(process)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return alive


def _runs(process: psutil.Process) -> bool:
    try:
        # A zombie has let go of its files and ports; its new parent, process 1, may take seconds to notice.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def marked_processes(home: Path) -> list[psutil.Process]:
    """Return the other running processes that carry the mark of this home or of one inside it."""
    found = []
    for process in psutil.process_iter():
        try:
            mark = process.environ().get(MARK)
            if mark and Path(mark).is_relative_to(home) and process.pid != os.getpid():
                found.append(process)
        except psutil.Error:  # ended meanwhile, a zombie, or another user's
            continue
    return found
