"""SeaweedFS in one process (`weed mini`), as the S3-compatible object store.

Considerations: everything listens on loopback and S3 asks for the generated key; the parts below S3 (master,
volume, filer) know no authentication, so whoever has an account on this machine can reach the objects there.
"""

import json
import shutil
import sys
import urllib.request
from pathlib import Path
from typing import ClassVar

from sluice.stack.errors import StackError
from sluice.stack.home import Home
from sluice.stack.process import Process, server_environment
from sluice.stack.server import Server

_PARTS = ("master", "volume", "filer", "s3", "admin")


class SeaweedFS(Server):
    """Object store; the bucket is made by whoever uses it."""

    title: ClassVar[str] = "SeaweedFS (S3)"

    def __init__(self, home: Home) -> None:
        super().__init__(home)
        self.process = Process("seaweedfs", home.logs / "seaweedfs.log")

    def prepare(self) -> None:
        usual = {"s3": 8333}
        self._ports = {part: self.home.port(f"weed_{part}", usual.get(part)) for part in _PARTS}
        self._grpc_ports = {part: self.home.port(f"weed_{part}_grpc") for part in _PARTS}
        self.access_key = self.home.secret("s3_access_key")
        self.secret_key = self.home.secret("s3_secret_key")

    def start(self) -> None:
        folder = self.home.folder("seaweedfs")
        data = self.home.folder("seaweedfs/data")
        identities = folder / "s3.json"
        identities.touch(mode=0o600)
        credentials = [{"accessKey": self.access_key, "secretKey": self.secret_key}]
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        identities.write_text(
            json.dumps({"identities": [{"name": "sluice", "credentials": credentials, "actions": actions}]})
        )
        options = {
            "dir": str(data),
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            **{f"{part}.port": str(port) for part, port in self._ports.items()},
            **{f"{part}.port.grpc": str(port) for part, port in self._grpc_ports.items()},
            # Relative: the path of a Unix socket may have 107 bytes, and the stack's folder may lie deep.
            "filer.localSocket": "filer.sock",
            "s3.localSocket": "s3.sock",
            "s3.config": str(identities),
            "s3.iam": "false",
            "s3.port.iceberg": "0",
            "s3.port.lance": "0",
            "admin.ui": "false",
            "webdav": "false",
            "master.telemetry": "false",
            "master.volumePreallocate": "false",
            "master.volumeSizeLimitMB": "1024",
            "volume.preStopSeconds": "0",
        }
        self.process.start(
            [_program(), "mini", *(f"-{name}={value}" for name, value in options.items())],
            env={**server_environment(self.home.path), "HOME": str(folder)},
            cwd=folder,
        )

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._ports['s3']}/healthz", timeout=1):
                return True
        except OSError:
            return False

    def environment(self) -> dict[str, str]:
        return {
            "SLUICE_S3_ENDPOINT": f"http://{self.address}",
            "SLUICE_S3_ACCESS_KEY": self.access_key,
            "SLUICE_S3_SECRET_KEY": self.secret_key,
            "SLUICE_S3_CHECKSUM": "crc32",
        }

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._ports['s3']}"


def _program() -> Path:
    # The wheel installs `weed` beside the interpreter, whether or not its environment is activated.
    beside = Path(sys.executable).parent / "weed"
    named = str(beside) if beside.exists() else shutil.which("weed")
    if named is None:
        raise StackError(
            "SeaweedFS is not installed: install the extra (sluice[stack]), or set SLUICE_S3_ENDPOINT, "
            "SLUICE_S3_ACCESS_KEY and SLUICE_S3_SECRET_KEY to a store that runs."
        )
    return Path(named)
