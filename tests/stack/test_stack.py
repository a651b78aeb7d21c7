"""The embedded servers: data that survives, processes that do not, doors that are shut."""

import asyncio
import io
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from urllib.parse import urlsplit

import aio_pika
import asyncpg
import psutil
import pytest
from aio_pika.exceptions import AMQPConnectionError
from minio import Minio
from minio.error import S3Error

from sluice.stack import Stack, StackError
from sluice.stack.home import Home
from sluice.stack.process import marked_processes

QUEUE = "kept"
NAMED = {
    "SLUICE_POSTGRES_DSN": "postgresql://u:p@db/x",
    "SLUICE_AMQP_URL": "amqp://u:p@mq/",
    "SLUICE_S3_ENDPOINT": "http://s3",
    "SLUICE_S3_ACCESS_KEY": "a",
    "SLUICE_S3_SECRET_KEY": "s",
}


@pytest.fixture(scope="module")
async def kept(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """A stack for all tests here, with data in each server; whether it runs is up to the test before."""
    stack = Stack(tmp_path_factory.mktemp("kept"), given={})
    try:
        stack.start()
        await leave_data(stack)
        yield stack
    finally:
        stack.purge()


@pytest.fixture
def running(kept: Stack) -> Stack:
    """The stack, started."""
    if not kept.home.is_locked:
        kept.start()
    return kept


@pytest.fixture
def stopped(kept: Stack) -> Stack:
    """The stack, stopped in order."""
    kept.stop()
    return kept


def object_store(environment: dict[str, str], *, secret_key: str | None = None) -> Minio:
    return Minio(
        urlsplit(environment["SLUICE_S3_ENDPOINT"]).netloc,
        access_key=environment["SLUICE_S3_ACCESS_KEY"],
        secret_key=secret_key or environment["SLUICE_S3_SECRET_KEY"],
        secure=False,
        region="us-east-1",
    )


async def leave_data(stack: Stack) -> None:
    """Put something into each server that it has promised to keep."""
    environment = stack.environment()
    connection = await asyncpg.connect(environment["SLUICE_POSTGRES_DSN"])
    await connection.execute("CREATE TABLE kept AS SELECT generate_series(1, 1000) AS n")
    await connection.close()
    async with await aio_pika.connect(environment["SLUICE_AMQP_URL"]) as broker:
        channel = await broker.channel(publisher_confirms=True)
        await channel.declare_queue(QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
        message = aio_pika.Message(b"kept", delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await channel.default_exchange.publish(message, QUEUE)
    # RabbitMQ 3.10 confirms a new quorum queue up to a second before it writes down which log belongs to it;
    # killed in between, the queue never has a leader again.
    await until(lambda: any(QUEUE.encode() in file.read_bytes() for file in stack.home.path.rglob("names.dets")))
    store = object_store(environment)
    await asyncio.to_thread(store.make_bucket, "kept")
    await asyncio.to_thread(store.put_object, "kept", "kept", io.BytesIO(b"kept"), 4)


async def assert_data_is_there(stack: Stack) -> None:
    environment = stack.environment()
    connection = await asyncpg.connect(environment["SLUICE_POSTGRES_DSN"])
    assert await connection.fetchval("SELECT sum(n) FROM kept") == 500500
    await connection.close()
    async with await aio_pika.connect(environment["SLUICE_AMQP_URL"]) as broker:
        queue = await (await broker.channel()).get_queue(QUEUE)
        async with queue.iterator(timeout=10) as messages:
            message = await anext(messages)
            assert message.body == b"kept"
            await message.nack(requeue=True)
    response = await asyncio.to_thread(object_store(environment).get_object, "kept", "kept")
    assert response.read() == b"kept"
    response.close()


def test_a_stop_leaves_no_process_and_no_open_port(running: Stack) -> None:
    server = psutil.Process(running.postgres.process.pid)  # it overwrites its environment, and with that the mark
    started = [server, *server.children(recursive=True), *marked_processes(running.home.path)]
    assert {"weed", "epmd", "beam.smp", "postgres"} <= {process.name() for process in started}
    ports = [connection.laddr.port for connection in listeners(started)]
    running.stop()
    assert not alive(started)
    assert not marked_processes(running.home.path)
    for port in ports:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0


async def test_a_restart_keeps_data_ports_and_passwords(stopped: Stack) -> None:
    before = stopped.environment()
    stopped.start()
    assert stopped.environment() == before
    await assert_data_is_there(stopped)


async def test_each_server_survives_its_own_kill(running: Stack) -> None:
    for server in running.servers:
        server.kill()
        assert not server.is_ready()
        server.restart()
    await assert_data_is_there(running)


async def test_orphaned_backends_do_not_keep_postgresql_from_starting(running: Stack) -> None:
    connection = await asyncpg.connect(running.environment()["SLUICE_POSTGRES_DSN"])
    # A backend that computes does not look whether its postmaster still lives.
    busy = asyncio.create_task(connection.execute("SELECT count(*) FROM generate_series(1, 100000000000)"))
    backend = psutil.Process(connection.get_server_pid())
    await until(lambda: backend.cpu_times().user >= 0.1)
    os.kill(running.postgres.process.pid, signal.SIGKILL)
    await asyncio.to_thread(running.postgres.restart)
    with pytest.raises(asyncpg.PostgresConnectionError):
        await busy
    await assert_data_is_there(running)


def test_every_listener_is_on_loopback(running: Stack) -> None:
    addresses = {connection.laddr.ip for connection in listeners(descendants())}
    assert addresses <= {"127.0.0.1", "::1"}


async def test_every_server_asks_for_its_password(running: Stack) -> None:
    environment = running.environment()
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(environment["SLUICE_POSTGRES_DSN"], password="wrong")
    for login, password in (("guest", "guest"), ("sluice", "wrong")):
        url = urlsplit(environment["SLUICE_AMQP_URL"])
        with pytest.raises(AMQPConnectionError):
            await aio_pika.connect(host=url.hostname, port=url.port, login=login, password=password)
    with pytest.raises(S3Error, match="SignatureDoesNotMatch"):
        await asyncio.to_thread(object_store(environment, secret_key="wrong").list_buckets)


def test_secrets_are_readable_by_their_owner_alone(running: Stack) -> None:
    secrets = {value.encode() for name, value in running.environment().items() if name.endswith("SECRET_KEY")}
    secrets |= {running.postgres.password.encode(), running.rabbitmq.password.encode()}
    assert stat.S_IMODE(running.home.path.stat().st_mode) == 0o700
    for file in running.home.path.rglob("*"):
        if file.is_file() and any(secret in file.read_bytes() for secret in secrets):
            assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0, file
    for process in marked_processes(running.home.path):
        assert not any(secret in " ".join(process.cmdline()).encode() for secret in secrets), process


def test_a_folder_that_others_cannot_enter_is_good_enough(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    only_postgres = {name: value for name, value in NAMED.items() if name != "SLUICE_POSTGRES_DSN"}
    stack = Stack(closed / "deep" / "home", given=only_postgres)
    try:
        stack.start()
        assert stack.postgres.is_ready()
    finally:
        stack.purge()
    assert not stack.home.path.exists()
    assert not stack.postgres.folder.exists()


def test_a_frozen_server_is_not_ready_until_it_goes_on(running: Stack) -> None:
    for server in running.servers:
        server.pause()
        assert not server.is_ready()
        server.resume()
        server.wait_ready()


def test_a_folder_in_use_is_refused_and_what_runs_there_is_left_alone(running: Stack) -> None:
    other = Stack(running.home.path, given={})
    for attempt in (other.start, other.purge):
        with pytest.raises(StackError, match=f"in use by process {os.getpid()}"):
            attempt()
    other.stop()
    assert all(server.is_ready() for server in running.servers)


def test_a_frozen_server_can_be_stopped(running: Stack) -> None:
    for server in running.servers:
        server.pause()
    running.stop()
    assert not marked_processes(running.home.path)


async def test_after_a_kill_of_the_starter_the_next_start_takes_over(stopped: Stack) -> None:
    program = (
        "import sys; from pathlib import Path; from sluice.stack import Stack\n"
        f"Stack(Path({str(stopped.home.path)!r}), given={{}}).start(); print('started', flush=True); sys.stdin.read()"
    )
    pipe = asyncio.subprocess.PIPE
    starter = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdin=pipe, stdout=pipe)
    assert starter.stdout is not None
    assert await starter.stdout.readline() == b"started\n"
    starter.kill()
    await starter.wait()
    orphans = marked_processes(stopped.home.path)
    assert orphans

    stopped.start()
    assert not alive(orphans)
    await assert_data_is_there(stopped)


def test_a_port_that_is_taken_is_passed_over(tmp_path: Path) -> None:
    home = Home(tmp_path, default_ports=False)
    home.lock()
    port = home.port("postgres")
    home.unlock()
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", port))
        squatter.listen()
        home.lock()
        assert home.port("postgres") != port


def test_servers_that_the_environment_names_are_not_started() -> None:
    stack = Stack.temporary(given=NAMED)
    stack.start()
    assert stack.servers == []
    assert stack.environment() == NAMED
    stack.purge()


def test_half_of_an_object_store_is_refused() -> None:
    with pytest.raises(StackError, match="SLUICE_S3_SECRET_KEY is not set"):
        Stack(given={"SLUICE_S3_ENDPOINT": "http://s3", "SLUICE_S3_ACCESS_KEY": "a"})


def test_a_service_that_dies_tells_why(services: Stack) -> None:
    [service] = services.spawn("gateway", 1, {"SLUICE_SLOTS": "many"})
    with pytest.raises(StackError, match="gateway-1 ended with status"):
        service.wait_ready()


def test_an_unknown_service_is_named_with_those_that_there_are(services: Stack) -> None:
    with pytest.raises(StackError, match="control, upload-worker, export-worker, gateway"):
        services.spawn("gateways")


def test_a_command_runs_on_servers_of_its_own_and_nothing_stays() -> None:
    program = "import os; print(os.environ['SLUICE_STACK_HOME']); raise SystemExit(7)"
    command = [sys.executable, "-m", "sluice.stack", "run", "--fast", "--", sys.executable, "-c", program]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    home = Path(done.stdout.strip())
    assert done.returncode == 7
    assert not home.exists()
    assert not marked_processes(home)


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_command_and_servers(ending: signal.Signals) -> None:
    program = "import os, sys; print(os.environ['SLUICE_STACK_HOME'], flush=True); sys.stdin.read()"
    command = [sys.executable, "-m", "sluice.stack", "run", "--fast", "--", sys.executable, "-c", program]
    runner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert runner.stdout is not None
    home = Path(runner.stdout.readline().strip())
    assert marked_processes(home)
    runner.send_signal(ending)
    runner.communicate()
    assert runner.returncode == 130
    assert not marked_processes(home)
    assert not home.exists()


def test_a_temporary_stack_of_a_killed_process_is_purged_by_the_next(tmp_path: Path) -> None:
    program = (
        "import os, signal; from sluice.stack import Stack\n"
        "stack = Stack.temporary(fast=True, given={}); stack.start()\n"
        "print(stack.home.path, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    inside = {**os.environ, "SLUICE_STACK_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=inside, check=False)
    home = Path(done.stdout.strip())
    assert marked_processes(home)
    os.utime(home / "lock", (0, 0))
    program = "from sluice.stack import Stack; Stack.temporary(given={}).purge()"
    subprocess.run([sys.executable, "-c", program], env=inside, check=True)
    assert not marked_processes(home)
    assert not home.exists()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  nothing announces it
        await asyncio.sleep(0.02)


def descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def listeners(processes: list[psutil.Process]) -> list[psutil._ntuples.pconn]:
    return [
        connection
        for process in processes
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
