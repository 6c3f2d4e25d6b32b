"""Limits of a service."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ServingSettings:
    """Limits of `create_app`.

    Attributes:
        batch: Most images in one forward pass.
        max_wait: Seconds that the model waits for a request that is still being received or
            decoded, so that it can join the batch; without such requests it starts at once.
        queue: Requests that are accepted at a time, including those that are being computed;
            further ones get status 503.
        timeout: Seconds until a request gets status 504, or 408 while its body is being received.
        max_bytes: Largest image file; larger ones get status 413.
        max_pixels: Most pixels of an image, as its header states them; others get status 413.
        top_k: Most detections per image.
    """

    batch: int = 8
    max_wait: float = 0.01
    queue: int = 64
    timeout: float = 30.0
    max_bytes: int = 20_000_000
    max_pixels: int = 64_000_000
    top_k: int = 300

    def __post_init__(self) -> None:
        for name in ("batch", "queue", "timeout", "max_bytes", "max_pixels", "top_k"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"{name}: expected a value above 0, got {value}")
        if not self.max_wait >= 0:
            raise ValueError(f"max_wait: expected 0 or more seconds, got {self.max_wait}")
