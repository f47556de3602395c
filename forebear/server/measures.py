"""What ``/metrics`` says, for Prometheus; of one server, not of the process's other users of the client library."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Measures:
    """Counters of one server. No label holds anything that a client wrote."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "forebear_requests", "Requests that were answered.", ("route", "status"), registry=registry
        )
        self.seconds = Histogram(
            "forebear_request_seconds", "From a request's head to its end.", ("route",),
            registry=registry, buckets=SECONDS,
        )  # fmt: skip
        self.batch_requests = Histogram(
            "forebear_batch_requests", "Requests that were computed together.", registry=registry, buckets=COUNTS
        )
        self.batch_texts = Histogram(
            "forebear_batch_texts", "Test rows that were computed together.", registry=registry, buckets=COUNTS
        )
        self.batch_seconds = Histogram(
            "forebear_batch_seconds", "Computing a batch.", registry=registry, buckets=SECONDS
        )
        self.dropped = Counter(
            "forebear_dropped", "Requests that were dropped before they were computed.", ("why",), registry=registry
        )
        self.waiting = Gauge("forebear_waiting", "Requests that wait.", ("index",), registry=registry)
        self.rows = Gauge("forebear_index_rows", "Live training rows.", ("index",), registry=registry)
        self.reloads = Counter(
            "forebear_index_reloads", "Times that an index was opened anew.", ("index",), registry=registry
        )

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self.registry)
