"""RabbitMQ from the system package, as a node of its own: own data, ports, cookie and user.

Considerations: the node name is the same in every stack, because the name service (epmd) is our own too, on a
port of its own; the system's broker and epmd are neither used nor disturbed. Everything listens on loopback.
"""

import shutil
import socket
import urllib.request
from pathlib import Path
from typing import ClassVar

from sluice.stack.errors import StackError
from sluice.stack.home import Home
from sluice.stack.process import Process, server_environment
from sluice.stack.server import Server

_USER = "sluice"


class RabbitMQ(Server):
    """Broker with the management console."""

    title: ClassVar[str] = "RabbitMQ"

    def __init__(self, home: Home) -> None:
        super().__init__(home)
        self.process = Process("rabbitmq", home.logs / "rabbitmq.log")
        self._names = Process("epmd", home.logs / "epmd.log")

    def prepare(self) -> None:
        self.port = self.home.port("amqp", 5672)
        self.management_port = self.home.port("rabbitmq_management", 15672)
        self._distribution_port = self.home.port("rabbitmq_distribution")
        self._names_port = self.home.port("epmd")
        self.password = self.home.secret("rabbitmq")

    def start(self) -> None:
        program, epmd = _programs()
        folder = self.home.folder("rabbitmq")
        # Read on the first start of an empty node: this user instead of `guest`.
        config = folder / "rabbitmq.conf"
        config.touch(mode=0o600)
        config.write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self.port}\n"
            "management.tcp.ip = 127.0.0.1\n"
            f"management.tcp.port = {self.management_port}\n"
            f"default_user = {_USER}\n"
            f"default_pass = {self.password}\n"
        )
        plugins = folder / "enabled_plugins"
        plugins.write_text("[rabbitmq_management].\n")
        env = {
            **server_environment(self.home.path),
            "HOME": str(folder),  # where Erlang makes its cookie
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self._names_port),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",  # the system's would win over these
            "RABBITMQ_CONFIG_FILE": str(config),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "advanced.config"),
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(plugins),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_LOG_BASE": str(folder),
            "RABBITMQ_MNESIA_BASE": str(folder / "data"),
            "RABBITMQ_NODENAME": "sluice@localhost",
            # +sbwt none: idle schedulers sleep instead of spinning, which a small machine feels.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}"
            " +sbwt none +sbwtdcpu none +sbwtdio none",
        }
        self._names.start([epmd, "-port", str(self._names_port), "-address", "127.0.0.1"], env=env, cwd=folder)
        self.process.start([program], env=env, cwd=folder)

    def is_ready(self) -> bool:
        return self._speaks_amqp() and self._management_answers()

    def environment(self) -> dict[str, str]:
        credentials = f"{_USER}:{self.password}"
        return {
            "SLUICE_AMQP_URL": f"amqp://{credentials}@127.0.0.1:{self.port}/",
            "SLUICE_RABBITMQ_MANAGEMENT_URL": f"http://{credentials}@127.0.0.1:{self.management_port}",
        }

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def stop(self) -> None:
        # About 7 s before 3.13, most of it asleep in the management plugin (rabbitmq-server #11070).
        super().stop()
        self._names.stop()

    def kill(self) -> None:
        super().kill()
        self._names.kill()

    def _speaks_amqp(self) -> bool:
        # The listener opens last, but only a Connection.Start frame (type 1) proves the broker behind it.
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"AMQP\x00\x00\x09\x01")
                return connection.recv(1) == b"\x01"
        except OSError:
            return False

    def _management_answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.management_port}/", timeout=1):
                return True
        except OSError:
            return False


def _programs() -> tuple[Path, Path]:
    # Debian's /usr/sbin/rabbitmq-server insists on being root or rabbitmq; the one below it does not.
    found = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
    if not found.exists():
        named = shutil.which("rabbitmq-server")
        if named is None:
            raise StackError(
                "RabbitMQ is not installed. On Debian and Ubuntu: apt-get install rabbitmq-server "
                "(`./dev` does it when it may). Or set SLUICE_AMQP_URL to a broker that runs."
            )
        found = Path(named)
    epmd = shutil.which("epmd")
    if epmd is None:
        raise StackError("Erlang's epmd is not on PATH; it comes with RabbitMQ's package erlang-base.")
    return found, Path(epmd)
