"""The minio SDK in threads: the only signer, the only admin client, and where its errors become ours."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from http import HTTPStatus
from typing import TypeVar
from urllib.parse import urlsplit
from xml.etree.ElementTree import ParseError

import urllib3
import yarl
from minio import Minio
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError

from shared.config import Settings
from shared.domain.errors import (
    IntegrityMismatch,
    ObjectMissing,
    SluiceError,
    SourceChanged,
    StoreMisconfigured,
    StoreRefused,
    StoreUnavailable,
    UploadMissing,
)

T = TypeVar("T")

DATA_PLANE_EXPIRY = timedelta(hours=1)  # looked at when a request begins, not while its bytes flow
ADMIN_THREADS = 8
CONNECT_SECONDS = 5.0
"""Of one attempt; the data plane uses it too."""

_MISCONFIGURED_CODES = {"NoSuchBucket", "PermanentRedirect", "AuthorizationHeaderMalformed"}
_DAMAGED_CODES = {"BadDigest", "XAmzContentChecksumMismatch"}
_UNAVAILABLE_CODES = {"SlowDown", "SlowDownRead", "SlowDownWrite", "RequestTimeout", "OperationAborted"}


class S3Client:
    """Signs URLs on the spot and runs the SDK's calls in threads of its own."""

    def __init__(self, settings: Settings, *, idle_seconds: float, copy_seconds: float) -> None:
        self.bucket = settings.s3_bucket
        self.region = settings.s3_region
        self.endpoint = settings.s3_endpoint
        self._quick = self._connect(settings, read_seconds=idle_seconds)
        self._patient = self._connect(settings, read_seconds=copy_seconds)
        self._public = self._quick
        if settings.s3_public_endpoint is not None:
            public = settings.model_copy(update={"s3_endpoint": settings.s3_public_endpoint})
            self._public = self._connect(public, read_seconds=idle_seconds)
        self._threads = ThreadPoolExecutor(ADMIN_THREADS, thread_name_prefix="s3-admin")

    @staticmethod
    def _connect(settings: Settings, *, read_seconds: float) -> Minio:
        endpoint = urlsplit(settings.s3_endpoint)
        if endpoint.scheme not in ("http", "https") or not endpoint.netloc or endpoint.path.strip("/"):
            raise StoreMisconfigured(
                f"the address of the object store is {settings.s3_endpoint!r}; write SLUICE_S3_ENDPOINT as http://host:port"
            )
        return Minio(
            endpoint.netloc,
            settings.s3_access_key.get_secret_value(),
            settings.s3_secret_key.get_secret_value(),
            secure=endpoint.scheme == "https",
            region=settings.s3_region,  # given, so that signing never asks the store for it
            http_client=urllib3.PoolManager(
                maxsize=ADMIN_THREADS,
                timeout=urllib3.Timeout(connect=CONNECT_SECONDS, read=read_seconds),
                retries=urllib3.Retry(
                    total=2,
                    read=0,  # a stalled store must not stall us once per retry
                    backoff_factor=0.2,
                    status_forcelist=(500, 502, 503, 504),
                    raise_on_status=False,
                    respect_retry_after_header=False,
                ),
            ),
        )

    def presign(
        self,
        method: str,
        key: str,
        *,
        expiry: timedelta = DATA_PLANE_EXPIRY,
        query: dict[str, str] | None = None,
        public: bool = False,
    ) -> yarl.URL:
        """`public`: for somebody else, by the address that others know the store by."""
        signer = self._public if public else self._quick
        url = signer.get_presigned_url(method, self.bucket, key, expires=expiry, extra_query_params=dict(query or {}))
        return yarl.URL(url, encoded=True)  # quoting it again would break the signature

    async def ask(self, question: Callable[[Minio], T], key: str = "") -> T:
        """Run a call that changes nothing; a cancel leaves it to end by itself."""
        with self._translated(key):
            return await asyncio.get_running_loop().run_in_executor(self._threads, question, self._quick)

    async def change(self, work: Callable[[Minio], T], key: str = "", *, patient: bool = False) -> T:
        """Run a call that changes something; `patient` gives the store time to copy.

        A cancel waits for its end, so that nothing changes any more after it.
        """
        client = self._patient if patient else self._quick
        running = asyncio.get_running_loop().run_in_executor(self._threads, work, client)
        with self._translated(key):
            try:
                return await asyncio.shield(running)
            except asyncio.CancelledError:
                await asyncio.gather(running, return_exceptions=True)
                raise

    @contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        try:
            yield
        except (MinioException, urllib3.exceptions.HTTPError, ParseError) as error:
            raise self._translate(error, key) from error

    def _translate(self, error: Exception, key: str) -> SluiceError:
        match error:
            case S3Error():
                return self.refusal(error.response.status, error.code or "", error.message or "", key)
            case ServerError():
                return self.refusal(error.status_code, "", str(error), key)
            case InvalidResponseError():
                return self.refusal(error._code, "", str(error), key)
        reason = error.reason if isinstance(error, urllib3.exceptions.MaxRetryError) else error
        return StoreUnavailable(f"the object store at {self.endpoint} does not answer: {reason}")

    def refusal(self, status: int, code: str, message: str, key: str) -> SluiceError:
        """The error that an HTTP answer means."""
        answer = f"{status} {code} {message}".strip()
        if code == "NoSuchUpload":
            return UploadMissing(f"the store knows no such upload of {key!r}")
        if status == HTTPStatus.PRECONDITION_FAILED:
            return SourceChanged(f"the object {key!r} was replaced")
        if code in _DAMAGED_CODES:
            return IntegrityMismatch(f"the object store received other bytes of {key!r} than were sent ({answer})")
        if code in _MISCONFIGURED_CODES or status in (301, 307, 401, 403):
            return StoreMisconfigured(
                f"the object store at {self.endpoint} refuses us ({answer}); check SLUICE_S3_ACCESS_KEY, "
                f"SLUICE_S3_SECRET_KEY, SLUICE_S3_REGION, the bucket {self.bucket!r} and this machine's clock"
            )
        if status == HTTPStatus.NOT_FOUND:
            return ObjectMissing(f"the object store has no object {key!r}")
        if status in (HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.INSUFFICIENT_STORAGE):
            answer += "; look into its log, and whether its disk is full"
        if status >= 500 or status in (408, 429) or code in _UNAVAILABLE_CODES:
            return StoreUnavailable(f"the object store at {self.endpoint} could not serve {key!r}: {answer}")
        return StoreRefused(f"the object store at {self.endpoint} refused {key!r}: {answer}")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
