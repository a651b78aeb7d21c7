"""The health check of the containers, as the process that they run."""

import asyncio
import socket
import sys

from pydantic import SecretStr

from shared.config import Settings
from shared.domain.errors import BusUnavailable
from shared.service import serve_health


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


async def asked(port: int) -> tuple[int | None, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "shared.healthcheck", str(port), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    return process.returncode, output.decode()


async def test_the_health_check_says_what_readyz_says() -> None:
    broker_is_away = False

    async def rabbitmq() -> None:
        if broker_is_away:
            raise BusUnavailable("no session with RabbitMQ")

    port = free_port()
    settings = Settings(
        postgres_dsn="",
        amqp_url="",
        s3_endpoint="",
        s3_access_key=SecretStr(""),
        s3_secret_key=SecretStr(""),
        health_port=port,
    )
    runner = await serve_health(settings, {"rabbitmq": rabbitmq})
    assert runner is not None
    try:
        assert (await asked(port))[0] == 0
        broker_is_away = True
        status, output = await asked(port)
        assert status == 1
        assert '"rabbitmq": "away"' in output
    finally:
        await runner.cleanup()


async def test_the_health_check_fails_when_nobody_listens() -> None:
    status, output = await asked(free_port())
    assert status == 1
    assert "no answer" in output
