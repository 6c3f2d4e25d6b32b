"""`cdetr-fast serve`: a model behind HTTP, with a page to try it."""

from __future__ import annotations

import socket
from typing import Annotated

import typer

from cdetr_fast.cli.detector import Detector
from cdetr_fast.cli.errors import UserError, require_packages
from cdetr_fast.cli.options import DeviceOption, EngineOption, ModelOption, RevisionOption
from cdetr_fast.common.errors import first_line


def serve(
    model: ModelOption = None,
    host: Annotated[
        str, typer.Option(metavar="TEXT", help="Address; 0.0.0.0 accepts other machines.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="INTEGER", min=0, max=65535, help="0 takes a free one.")
    ] = 8000,
    batch: Annotated[
        int, typer.Option(metavar="INTEGER", min=1, help="Most images in one forward pass.")
    ] = 8,
    max_wait: Annotated[
        float,
        typer.Option(
            metavar="FLOAT",
            min=0.0,
            help="Milliseconds to wait for a request that is just coming in, to join the batch.",
        ),
    ] = 10.0,
    queue: Annotated[
        int, typer.Option(metavar="INTEGER", min=1, help="Requests at a time; others get 503.")
    ] = 64,
    timeout: Annotated[
        float, typer.Option(metavar="FLOAT", min=0.1, help="Seconds for a request, then 504.")
    ] = 30.0,
    max_bytes: Annotated[
        int, typer.Option(metavar="INTEGER", min=1, help="Largest image file; others get 413.")
    ] = 20_000_000,
    max_pixels: Annotated[
        int, typer.Option(metavar="INTEGER", min=1, help="Most pixels; others get 413.")
    ] = 64_000_000,
    top_k: Annotated[
        int, typer.Option(metavar="INTEGER", min=1, help="Most detections per image.")
    ] = 300,
    device: DeviceOption = None,
    engine: EngineOption = "torch",
    revision: RevisionOption = None,
) -> None:
    """Serve a model: a page to try it, and an HTTP endpoint.

    POST /v1/detect takes an image and answers with JSON; GET /health and /metrics are for
    operators. Ctrl-C or SIGTERM stop it, after the requests that it has accepted.
    """
    require_packages("fastapi", "python_multipart", "prometheus_client", "uvicorn", extra="serve")
    from cdetr_fast import ConditionalDetrForObjectDetection
    from cdetr_fast.serving import ServingSettings, create_app
    from cdetr_fast.serving.server import open_socket, run

    try:
        opened = open_socket(host, port)
    except (OSError, UnicodeError) as error:  # the latter of what cannot be the name of a host
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(
            f"--host {host} --port {port}: cannot be used ({reason}); choose another "
            "port, or 0 for a free one"
        ) from error
    with opened:
        detector = Detector(model, revision, device)
        detector.note_its_classes()
        detector.optimize(engine)
        if not isinstance(detector.model, ConditionalDetrForObjectDetection):
            raise UserError(f"--model {detector.name}: segments; serve takes detection models")
        settings = ServingSettings(
            batch=batch,
            max_wait=max_wait / 1e3,
            queue=queue,
            timeout=timeout,
            max_bytes=max_bytes,
            max_pixels=max_pixels,
            top_k=top_k,
        )
        app = create_app(detector.model, settings, detector.name)

        def announce() -> None:
            print(f"{detector.describe()}, on {detector.describe_device()}")
            print(f"{_url(opened)} (Ctrl-C stops)", flush=True)

        try:
            run(app, opened, timeout, announce)
        except RuntimeError as error:
            raise UserError(first_line(error)) from error


def _url(opened: socket.socket) -> str:
    host, port = opened.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
