"""A request body becomes a file: streamed into the object store, published when whole, and otherwise undone."""

import asyncio
import secrets
from collections.abc import AsyncIterator

import structlog

from gateway.files import Check, Files, Ledger, StoredFile, forget, no_check, still_ours
from shared.domain.errors import SluiceError
from shared.domain.task import AccountId
from shared.multipart import MultipartWriter
from shared.ports.database import Database
from shared.ports.objects import ObjectStore

log = structlog.get_logger()


class Uploads:
    def __init__(
        self, database: Database, files: Files, objects: ObjectStore, *, part_bytes: int, lease_seconds: float
    ) -> None:
        self._database = database
        self._files = files
        self._objects = objects
        self._ledger = Ledger(database, lease_seconds=lease_seconds)
        self._part_bytes = part_bytes
        self._discarding: set[asyncio.Task[None]] = set()

    async def receive(
        self,
        account_id: AccountId,
        name: str,
        content_type: str,
        body: AsyncIterator[bytes],
        check: Check = no_check,
    ) -> tuple[StoredFile, bool]:
        """Store `body` as the file `name`, and whether it replaced one; `check` looks at the one that is there.

        Memory is bounded by a few parts, however slow the store. When it raises (what `body` raises included) no
        object, upload or ledger row is left; if the store is away, the sweeper removes them.
        """
        if check is not no_check:  # before all the bytes are sent for nothing
            there = await self._files.named(account_id, name)
            check(there.representation if there else None)
        key = f"files/{account_id}/{secrets.token_hex(16)}"
        sending = _Sending(self._ledger, key)
        await self._ledger.open(key)
        try:
            async with MultipartWriter(
                self._objects,
                key,
                part_bytes=self._part_bytes,
                content_type=content_type,
                on_upload_created=sending.uploading_as,
            ) as writer:
                async for chunk in body:
                    await writer.write(chunk)
                    await sending.keep_alive()
                await sending.keep_alive(at_once=True)
                etag = await writer.finish()
            return await self._files.publish(
                account_id, name, object_key=key, size=writer.bytes, etag=etag, content_type=content_type, check=check
            )
        except BaseException:
            # shield: the cancel that ends the upload must not end the cleaning as well
            await asyncio.shield(self._discard_later(sending))
            raise

    async def drain(self) -> None:
        """Wait for what is being cleaned away."""
        if self._discarding:
            await asyncio.wait(self._discarding)

    def _discard_later(self, sending: "_Sending") -> "asyncio.Task[None]":
        task = asyncio.create_task(self._discard(sending), name=f"discard {sending.key}")
        self._discarding.add(task)
        task.add_done_callback(self._discarding.discard)
        return task

    async def _discard(self, sending: "_Sending") -> None:
        try:
            # A commit whose answer was lost may have published it: then it is out of the ledger, and stays. It waits
            # for that commit; afterwards only the sweeper wants the object, to delete it as well.
            async with self._database.transaction() as connection:
                if not await still_ours(connection, sending.key):
                    return
            # Without a connection: the store may hang, and others need the database.
            if sending.upload_id is not None:
                await self._objects.abort_upload(sending.key, sending.upload_id)
            await self._objects.delete(sending.key)
            async with self._database.connection() as connection:
                await forget(connection, sending.key)
        except SluiceError as error:
            log.warning("an unfinished upload is left to the sweeper", object_key=sending.key, reason=error.detail)
            await self._leave(sending.key)

    async def _leave(self, key: str) -> None:
        try:
            await self._ledger.give_up(key)
        except SluiceError as error:
            log.warning("the ledger could not be told; its lease will end", object_key=key, reason=error.detail)


class _Sending:
    """One object on its way, and its row in the ledger."""

    def __init__(self, ledger: Ledger, key: str) -> None:
        self.key = key
        self.upload_id: str | None = None
        self._ledger = ledger
        self._extended_at = asyncio.get_running_loop().time()

    async def uploading_as(self, upload_id: str) -> None:
        self.upload_id = upload_id
        await self._extend()

    async def keep_alive(self, *, at_once: bool = False) -> None:
        idle = asyncio.get_running_loop().time() - self._extended_at
        if at_once or idle > self._ledger.lease_seconds / 10:
            await self._extend()

    async def _extend(self) -> None:
        await self._ledger.extend(self.key, upload_id=self.upload_id)
        self._extended_at = asyncio.get_running_loop().time()
