"""The application: routes, limits and errors of a service."""

import asyncio
import base64
import contextlib
import hashlib
import math
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from PIL import Image
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive
from torch import Tensor

import cdetr_fast
from cdetr_fast.common.errors import first_line
from cdetr_fast.images.results import DetectionResult
from cdetr_fast.models.modeling import ConditionalDetrForObjectDetection
from cdetr_fast.serving.batching import Batcher, Computed
from cdetr_fast.serving.metrics import Metrics
from cdetr_fast.serving.settings import ServingSettings
from cdetr_fast.serving.uploads import FORMATS, Rejected, decode, read_upload

T = TypeVar("T")

PAGE = Path(__file__).with_name("page.html")
_CLIENT_LEFT = 499  # as nginx counts it; nobody reads the response
_WARMUP_SIZE = (640, 480)
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"file": {"type": "string", "format": "binary"}},
                }
            },
            "image/*": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "No image in the request"},
    408: {"description": "The body took too long"},
    413: {"description": "Too many bytes or pixels"},
    415: {"description": "Not a format that is read"},
    422: {"description": "The image cannot be read, or `threshold` does not fit"},
    503: {"description": "Too many requests wait; see Retry-After"},
    504: {"description": "The result took too long"},
}


class Detection(BaseModel):
    """One object: class, score in [0, 1], and left, top, right, bottom in pixels."""

    score: float
    label: int
    name: str
    box_xyxy: tuple[float, float, float, float]


class Times(BaseModel):
    """Milliseconds of a request, and the number of images that were computed together."""

    decode: float
    wait: float
    model: float
    total: float
    batch: int


class Detections(BaseModel):
    """The objects of an image, best first; sizes and boxes are those of the upright image."""

    width: int
    height: int
    detections: list[Detection]
    times_ms: Times


class _Work(NamedTuple):
    pixels: Tensor
    threshold: float
    size_hw: tuple[int, int]


def create_app(
    model: ConditionalDetrForObjectDetection,
    settings: ServingSettings | None = None,
    name: str = "model",
) -> FastAPI:
    """Return an ASGI application that detects objects in uploaded images.

    `POST /v1/detect` answers with `Detections`; `GET /v1/model`, `/health` and `/metrics` describe
    the model and the service; `GET /` is a page to try it. Every error has a reason in `detail`.

    Args:
        model: A detection model, best one of `optimize`. Only the application may use it.
        settings: Limits.
        name: Name of the model for the page.
    """
    service = _Service(model, settings or ServingSettings(), name)
    app = FastAPI(
        title="cdetr_fast",
        version=cdetr_fast.__version__,
        lifespan=service.lifespan,
        docs_url=None,  # those pages load scripts from elsewhere
        redoc_url=None,
    )
    for kind in (HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _answer_error)
    post = app.post("/v1/detect", openapi_extra=_BODY, responses=_ERRORS)
    post(service.detect)
    app.get("/v1/model")(service.describe)
    app.get("/health")(service.health)
    app.get("/metrics", response_class=Response)(service.metrics_text)
    app.get("/", response_class=HTMLResponse, include_in_schema=False)(service.page)
    return app


class _Service:
    """State and routes of an application."""

    def __init__(
        self, model: ConditionalDetrForObjectDetection, settings: ServingSettings, name: str
    ) -> None:
        self.model, self.settings, self.name = model, settings, name
        self.accepted = 0
        self.metrics = Metrics(lambda: self.accepted)
        html = PAGE.read_text(encoding="utf-8")
        self._html, self._policy = html, _content_security_policy(html)
        self._batcher: Batcher[_Work, DetectionResult] | None = None

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Warm up decoder and model; at the end finish what was accepted."""
        settings = self.settings
        self._batcher = batcher = Batcher(
            self._compute,
            lambda work: work.size_hw,
            settings.batch,
            settings.max_wait,
            self.metrics.observe_batch,
        )
        # Decoded images are many times as large as their files: as many as two batches at a time.
        self._decoded = asyncio.Semaphore(2 * settings.batch)
        workers = min(4, os.cpu_count() or 1)
        with ThreadPoolExecutor(workers, thread_name_prefix="cdetr_fast-decode") as self._decoders:
            batcher.start()
            try:
                pixels = decode(_warmup_image(), math.inf, self.model.image_processor)
                await batcher.submit(self._work(pixels, 1.0))
                yield
            finally:
                await batcher.close()

    async def detect(
        self, request: Request, threshold: Annotated[float, Query(ge=0, le=1)] = 0.5
    ) -> Detections:
        """Detect objects in an image: the body of the request, or the file of a form."""
        began = time.perf_counter()
        status = 500
        if self.accepted >= self.settings.queue:
            self.metrics.requests.labels(503).inc()
            raise Rejected(503, "too many requests wait; try again", {"Retry-After": "1"})
        self.accepted += 1
        try:
            answer = await self._detect(request, threshold, began)
            status = 200
            self.metrics.seconds.observe(time.perf_counter() - began)
            return answer
        except ClientDisconnect as error:
            status = _CLIENT_LEFT
            raise Rejected(_CLIENT_LEFT, "the client left") from error
        except HTTPException as error:
            status = error.status_code
            raise
        finally:
            self.accepted -= 1
            self.metrics.requests.labels(status).inc()

    async def _detect(self, request: Request, threshold: float, began: float) -> Detections:
        batcher = self._running()
        deadline = asyncio.get_running_loop().time() + self.settings.timeout
        with batcher.expect_item():
            try:
                async with asyncio.timeout_at(deadline):
                    content = await read_upload(request, self.settings.max_bytes)
            except TimeoutError as error:
                raise Rejected(
                    408, "the image was not received in time", {"Connection": "close"}
                ) from error
            try:
                async with asyncio.timeout_at(deadline):
                    work = self._decode_and_compute(batcher, content, threshold)
                    decode_seconds, computed = await _unless_client_leaves(request.receive, work)
            except TimeoutError as error:
                raise Rejected(504, f"no result within {self.settings.timeout:g} s") from error
        total = time.perf_counter() - began
        return _answer(computed, threshold, decode_seconds, total)

    async def _decode_and_compute(
        self, batcher: Batcher[_Work, DetectionResult], content: bytes, threshold: float
    ) -> tuple[float, Computed[DetectionResult]]:
        loop = asyncio.get_running_loop()
        async with self._decoded:
            began = loop.time()
            processor = self.model.image_processor
            pixels = await loop.run_in_executor(
                self._decoders, decode, content, self.settings.max_pixels, processor
            )
            seconds = loop.time() - began
            return seconds, await batcher.submit(self._work(pixels, threshold))

    def _work(self, pixels: Tensor, threshold: float) -> _Work:
        # Images that get the same size share a batch: padding would cost time, and change results.
        return _Work(pixels, threshold, self.model.image_processor.resized_hw(pixels))

    def _compute(self, batch: list[_Work]) -> list[DetectionResult]:
        """Run the model, in its thread."""
        results = self.model.predict(
            [work.pixels for work in batch],
            min(work.threshold for work in batch),
            top_k=self.settings.top_k,
            batch_size=len(batch),
        )
        assert isinstance(results, list), "one result for each image of a list"
        return results

    def _running(self) -> Batcher[_Work, DetectionResult]:
        assert self._batcher is not None, "the server runs the lifespan first"
        if self._batcher.closing:
            raise Rejected(503, "the service is shutting down", {"Retry-After": "5"})
        return self._batcher

    async def health(self) -> JSONResponse:
        """Return 200 if requests are answered, 503 with the reason if not."""
        reason = self._unready_reason()
        content = {"ready": reason is None, "reason": reason, "accepted": self.accepted}
        return JSONResponse(content, 200 if reason is None else 503)

    def _unready_reason(self) -> str | None:
        batcher = self._batcher
        if batcher is None or batcher.closing:
            return "not running"
        if (seconds := batcher.busy_seconds) > self.settings.timeout:
            return f"the model has been computing a batch for {seconds:.0f} s"
        if self.accepted >= self.settings.queue:
            return "the queue is full"
        return None

    async def describe(self) -> dict[str, Any]:
        """Return the model's name, device and classes, and the limits of requests."""
        return {
            "name": self.name,
            "device": str(self.model.device),
            "labels": self.model.config.id2label,
            "formats": FORMATS,
            "max_bytes": self.settings.max_bytes,
            "max_pixels": self.settings.max_pixels,
            "top_k": self.settings.top_k,
        }

    async def metrics_text(self) -> Response:
        """Return the metrics in Prometheus' text form."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page(self) -> HTMLResponse:
        """Return the page."""
        headers = {"Content-Security-Policy": self._policy, "Cache-Control": "no-cache"}
        return HTMLResponse(self._html, headers=headers)


def _warmup_image() -> bytes:
    content = BytesIO()
    Image.new("RGB", _WARMUP_SIZE).save(content, "JPEG")
    return content.getvalue()


def _answer(
    computed: Computed[DetectionResult], threshold: float, decode_seconds: float, total: float
) -> Detections:
    result = computed.result.above(threshold)  # the batch had the lowest threshold of its requests
    height, width = result.image_hw
    rows = zip(
        result.scores.tolist(),
        result.labels.tolist(),
        result.names,
        result.boxes_xyxy.tolist(),
        strict=True,
    )
    return Detections(
        width=width,
        height=height,
        detections=[
            Detection(
                score=round(score, 6),
                label=label,
                name=name,
                box_xyxy=(round(x0, 3), round(y0, 3), round(x1, 3), round(y1, 3)),
            )
            for score, label, name, (x0, y0, x1, y1) in rows
        ],
        times_ms=Times(
            decode=round(1e3 * decode_seconds, 2),
            wait=round(1e3 * computed.waited, 2),
            model=round(1e3 * computed.seconds, 2),
            total=round(1e3 * total, 2),
            batch=computed.batch,
        ),
    )


async def _unless_client_leaves(receive: Receive, work: Awaitable[T]) -> T:
    """Return the result of `work`; cancel it and raise ClientDisconnect if the client is gone."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for future in (task, gone):
            future.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        reason = f"{first['loc'][-1]}: {first['msg'].lower()}, got {first['input']!r}"
        return JSONResponse({"detail": reason}, 422)
    if isinstance(error, HTTPException):
        return JSONResponse({"detail": error.detail}, error.status_code, error.headers)
    return JSONResponse({"detail": f"internal error: {first_line(error)}"}, 500)  # and it is logged


def _content_security_policy(html: str) -> str:
    """Return the policy that runs the page's own script and loads nothing from elsewhere."""
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src blob: data:; media-src blob: mediastream:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
