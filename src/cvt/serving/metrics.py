"""What a service measures, in Prometheus' text format."""

from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one application, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

        def create(kind: type, name: str, help: str, *labels: str, **settings: object) -> Any:
            return kind(f"cvt_{name}", help, labels, registry=self.registry, **settings)

        self.requests = create(Counter, "requests", "Requests answered.", "path", "status")
        self.request_seconds = create(
            Histogram,
            "request_seconds",
            "Seconds from a request to its answer.",
            "path",
            buckets=SECONDS,
        )
        self.images = create(Counter, "images", "Images answered.", "model", "status")
        self.batch_images = create(
            Histogram, "batch_images", "Images of a batch.", "model", buckets=IMAGES
        )
        self.batch_seconds = create(
            Histogram,
            "batch_seconds",
            "Seconds that a batch took the model.",
            "model",
            buckets=SECONDS,
        )
        self.queued = create(Gauge, "queued_images", "Images that are read, decoded or computed.")

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self.registry)
