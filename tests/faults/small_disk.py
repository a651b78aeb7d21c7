"""An object store whose disk can be full: a SeaweedFS on a file system in memory that only it sees, and that grows."""

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from sluice.stack.home import Home
from sluice.stack.process import Process
from sluice.stack.seaweedfs import SeaweedFS

# The mount lives in a namespace of the process and ends with it. Without root that takes a user namespace, which not
# every machine allows.
_ROOT = os.geteuid() == 0
_UNSHARE = ["unshare", "--mount"] if _ROOT else ["unshare", "--map-root-user", "--mount"]
_ENTER = ["nsenter", "--mount"] if _ROOT else ["nsenter", "--user", "--mount", "--preserve-credentials"]
_MOUNT = 'mount -t tmpfs -o "size=$0" none "$1" && shift && exec "$@"'


class _OnSmallDisk(Process):
    """What it starts finds the folder `data` on a small disk."""

    def __init__(self, name: str, log: Path, data: Path, size: str) -> None:
        super().__init__(name, log)
        self._data = str(data)
        self._size = size

    def start(self, argv: Sequence[str | Path], *, env: Mapping[str, str], cwd: Path, user: str | None = None) -> None:
        super().start([*_UNSHARE, "sh", "-c", _MOUNT, self._size, self._data, *argv], env=env, cwd=cwd, user=user)

    def grow(self, size: str) -> None:
        # What else the mount says of itself, its owner by another number for one, is not to be said again.
        mount = ["mount", "--options-mode", "ignore", "-o", f"remount,size={size}", self._data]
        subprocess.run([*_ENTER, f"--target={self.pid}", *mount], check=True)


class SmallStore:
    """`room()` makes the disk large."""

    def __init__(self, home: Home, size: str) -> None:
        self.weed = SeaweedFS(home)
        self._process = _OnSmallDisk("seaweedfs", home.logs / "seaweedfs.log", home.folder("seaweedfs/data"), size)
        self.weed.process = self._process

    def room(self) -> None:
        self._process.grow("1g")

    async def is_full(self) -> None:
        """Wait until a write has failed for want of space."""
        async with asyncio.timeout(60):
            # The store says it in its log only: to its clients a full disk is an internal error.
            while b"no space left on device" not in self._process.log.read_bytes():  # noqa: ASYNC110
                await asyncio.sleep(0.05)


@asynccontextmanager
async def small_store(folder: Path, size: str) -> AsyncIterator[SmallStore]:
    """Skips the test where no such disk can be made."""
    data = folder / "data"
    data.mkdir()
    trial = await asyncio.to_thread(
        subprocess.run, [*_UNSHARE, "sh", "-c", _MOUNT, size, str(data), "true"], capture_output=True, text=True
    )
    if trial.returncode:
        pytest.skip(f"no small disk can be made here: {trial.stderr.strip()}")
    home = Home(folder, default_ports=False)
    home.folder("logs")
    store = SmallStore(home, size)
    store.weed.prepare()
    store.weed.start()
    try:
        await asyncio.to_thread(store.weed.wait_ready)
        yield store
    finally:
        await asyncio.to_thread(store.weed.kill)
