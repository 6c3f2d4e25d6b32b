"""Metrics of a service, in Prometheus' text form."""

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Metrics of one application, in a registry of its own.

    Args:
        waiting: Returns the number of accepted requests.

    Attributes:
        requests: Detection requests by status; 499 is a client that left.
        seconds: Time of a detection request, until its answer.
        model_seconds: Time of a forward pass with its preparation.
        batch: Images in a forward pass.
    """

    def __init__(self, waiting: Callable[[], float]) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self.requests = Counter(
            "cdetr_fast_requests", "Detection requests.", ("status",), registry=self._registry
        )
        self.seconds = Histogram(
            "cdetr_fast_request_seconds",
            "Time of an answered detection request.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.model_seconds = Histogram(
            "cdetr_fast_batch_seconds",
            "Time of a batch in the model, with preparing its images.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.batch = Histogram(
            "cdetr_fast_batch_images", "Images in a batch.", buckets=_SIZES, registry=self._registry
        )
        accepted = Gauge(
            "cdetr_fast_accepted_requests",
            "Detection requests that wait or are being computed.",
            registry=self._registry,
        )
        accepted.set_function(waiting)

    def observe_batch(self, size: int, seconds: float) -> None:
        """Count a batch."""
        self.batch.observe(size)
        self.model_seconds.observe(seconds)

    def text(self) -> bytes:
        """Return all metrics."""
        return generate_latest(self._registry)
