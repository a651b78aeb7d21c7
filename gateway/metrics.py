"""Numbers about requests, for Prometheus. Routes are labelled by their pattern, so that labels stay few."""

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

MEDIA_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "sluice_http_requests", "Requests answered", ["method", "route", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "sluice_http_request_seconds",
            "Time from the request's head to the answer's last byte",
            ["method", "route"],
            buckets=(0.005, 0.02, 0.1, 0.5, 2, 10, 60, 600),
            registry=self.registry,
        )
        self._bytes_in = Counter("sluice_file_bytes_received", "Bytes of files received", registry=self.registry)
        self._bytes_out = Counter("sluice_file_bytes_sent", "Bytes of files sent", registry=self.registry)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def received(self, count: int) -> None:
        self._bytes_in.inc(count)

    def sent(self, count: int) -> None:
        self._bytes_out.inc(count)

    def exposition(self) -> bytes:
        return generate_latest(self.registry)
