"""The service over HTTP with a tiny model: answers, bad uploads, limits, health, metrics."""

import asyncio
import json
import re
import struct
import threading
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from support.service import RawRequest, client_of
from support.threads import until
from support.tiny import NAMES, randomized, tiny_config

from cdetr_fast import ConditionalDetrForObjectDetection, ConditionalDetrImageProcessor
from cdetr_fast.serving import ServingSettings, create_app

SIZE = {"shortest_edge": 64, "longest_edge": 96}
RAW = {"Content-Type": "image/png"}


@pytest.fixture(scope="module")
def model():
    found = randomized(ConditionalDetrForObjectDetection(tiny_config()))
    found.image_processor = ConditionalDetrImageProcessor(size=SIZE)
    return found


@pytest.fixture(scope="module")
def picture():
    noise = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((60, 40), Image.Resampling.BICUBIC)


def encoded(image, form="PNG", **options):
    file = BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def chunk(kind, content):
    return (
        struct.pack(">I", len(content)) + kind + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )  # fmt: skip


def bomb(width, height):
    """A PNG file of few bytes whose header promises many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)


def serve(app, use):
    """Run `use(client)` against a started application."""

    async def main():
        async with client_of(app) as client:
            return await use(client)

    return asyncio.run(main())


def post(app, content, headers=RAW, **query):
    return serve(
        app, lambda c: c.post("/v1/detect", content=content, headers=headers, params=query)
    )


def check(response, model, image, threshold):
    """Compare an answer with `predict` of the image."""
    assert response.status_code == 200, response.text
    answer = response.json()
    expected = type(model).predict(model, image, threshold)
    assert (answer["height"], answer["width"]) == expected.image_hw
    found = answer["detections"]
    assert [d["label"] for d in found] == expected.labels.tolist()
    assert [d["name"] for d in found] == expected.names
    np.testing.assert_allclose([d["score"] for d in found], expected.scores, atol=1e-5)
    boxes = np.array([d["box_xyxy"] for d in found]).reshape(-1, 4)
    np.testing.assert_allclose(boxes, expected.boxes_xyxy, atol=2e-2)
    return answer


@pytest.mark.parametrize("threshold", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("how", ["png", "jpeg", "octets", "untyped", "form", "any field"])
def test_answers_are_those_of_predict(model, picture, how, threshold):
    content = encoded(picture, "JPEG" if how == "jpeg" else "PNG")
    sent = {
        "form": {"files": {"file": ("photo.png", content, "image/png")}},
        "any field": {"files": {"picture": content}, "data": {"note": "x"}},
        "untyped": {"content": content},
        "octets": {"content": content, "headers": {"Content-Type": "application/octet-stream"}},
    }.get(how, {"content": content, "headers": {"Content-Type": f"image/{how}"}})
    response = serve(
        create_app(model), lambda c: c.post(f"/v1/detect?threshold={threshold}", **sent)
    )
    answer = check(response, model, content, threshold)
    assert (len(answer["detections"]) > 0) == (threshold < 1)
    times = answer["times_ms"]
    assert times["batch"] == 1
    assert 0 < times["model"] <= times["total"]
    assert times["decode"] + times["wait"] + times["model"] <= times["total"] + 0.1


def unusual():
    picture = Image.linear_gradient("L").resize((50, 30)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [Image.new("RGB", (50, 30), colour) for colour in ("red", "blue")]
    return {
        "turned": encoded(picture, "JPEG", exif=exif),
        "cmyk": encoded(picture.convert("CMYK"), "JPEG"),
        "grey": encoded(picture.convert("L")),
        "palette": encoded(picture.convert("P"), "GIF"),
        "transparent": encoded(picture.convert("RGBA")),
        "animated gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated webp": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "bilevel": encoded(picture.convert("1"), "TIFF"),
        "one pixel": encoded(picture.resize((1, 1))),
        "one pixel wide": encoded(picture.resize((1, 20_000))),
        "damaged exif": encoded(picture, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
    }


@pytest.mark.parametrize("name", unusual())
def test_unusual_images_are_answered(model, name):
    content = unusual()[name]
    answer = check(post(create_app(model), content, threshold=0.0), model, content, 0.0)
    assert answer["detections"]
    if name == "turned":
        assert (answer["width"], answer["height"]) == (30, 50)


def refused():
    png = encoded(Image.linear_gradient("L").resize((50, 30)).convert("RGB"))
    deep = Image.fromarray(np.full((30, 50), 40_000, dtype=np.uint16))
    eps = encoded(Image.new("RGB", (9, 9)), "EPS")
    form = {"Content-Type": "multipart/form-data"}
    closed = {"Content-Type": "multipart/form-data; boundary=x"}
    field = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n--x--\r\n'
    file = b'--x\r\nContent-Disposition: form-data; name="a"; filename="b"\r\n\r\n'
    return {
        "empty": (b"", RAW, 400, "0 bytes"),
        "text": (b"not an image", RAW, 422, "not an image"),
        "zeros": (bytes(1000), RAW, 422, "not an image"),
        "cut png": (png[: len(png) // 2], RAW, 422, "truncated"),
        "cut jpeg": (encoded(deep.convert("L"), "JPEG")[:300], RAW, 422, "cannot be read"),
        "header alone": (png[:30], RAW, 422, "cannot be read"),
        "16 bits": (encoded(deep), RAW, 422, "8 bits per channel"),
        "bomb": (bomb(60_000, 60_000), RAW, 413, "pixels"),
        "smaller bomb": (bomb(12_000, 8_000), RAW, 413, "12000 x 8000"),
        "program": (eps, RAW, 415, "got EPS"),
        "json": (b"{}", {"Content-Type": "application/json"}, 415, "expected image/"),
        "curl's default": (
            png, {"Content-Type": "application/x-www-form-urlencoded"}, 415, "--form file=@"
        ),
        "no boundary": (png, form, 400, "oundary"),
        "form without file": (field, closed, 400, "expected a file, got none"),
        "empty file": (file + b"\r\n--x--\r\n", closed, 400, "0 bytes"),
        "two files": (
            file + b"1\r\n" + file + b"2\r\n--x--\r\n", closed, 400, "Too many files"
        ),
        "form of noise": (b"noise", closed, 400, ""),
    }  # fmt: skip


def test_bad_uploads_get_a_reason_and_the_next_request_an_answer(model, picture):
    async def use(client):
        good = encoded(picture)
        for name, (content, headers, status, reason) in refused().items():
            response = await client.post("/v1/detect", content=content, headers=headers)
            assert response.status_code == status, (name, response.text)
            assert reason in response.json()["detail"], (name, response.text)
            again = await client.post("/v1/detect", content=good, headers=RAW)
            assert again.status_code == 200, (name, again.text)

    serve(create_app(model), use)


@pytest.mark.parametrize("threshold", ["-0.1", "1.5", "nan", "high", ""])
def test_wrong_threshold(model, picture, threshold):
    response = post(create_app(model), encoded(picture), threshold=threshold)
    assert response.status_code == 422
    assert response.json()["detail"].startswith("threshold: ")


def test_limits_of_bytes_and_pixels(model, picture):
    content = encoded(picture)

    async def use(client):
        statuses = []
        for limit in (len(content), len(content) - 1):
            settings = ServingSettings(max_bytes=limit)

            async def chunks():  # without a Content-Length
                for i in range(0, len(content), 500):
                    yield content[i : i + 500]

            async with client_of(create_app(model, settings)) as other:
                for sent in (
                    {"content": content, "headers": RAW},
                    {"content": chunks(), "headers": RAW},
                    {"files": {"file": content}},
                ):
                    response = await other.post("/v1/detect", **sent)
                    statuses.append(response.status_code)
                    assert response.status_code == 200 or "bytes" in response.json()["detail"]
        return statuses

    assert serve(create_app(model), use) == [200, 200, 200, 413, 413, 413]
    for limit, status in ((2400, 200), (2399, 413)):
        settings = ServingSettings(max_pixels=limit)
        assert post(create_app(model, settings), content).status_code == status


def test_a_form_far_over_the_limit_is_not_read_to_its_end(model):
    async def main():
        app = create_app(model, ServingSettings(max_bytes=1000))
        async with client_of(app):
            request = RawRequest(app, {"Content-Type": "multipart/form-data; boundary=x"})
            head = b'--x\r\nContent-Disposition: form-data; name="a"; filename="b"\r\n\r\n'
            request.body(head + bytes(100_000), more=True)
            await asyncio.wait_for(request.task, 5)
            return request

    request = asyncio.run(main())
    assert request.status == 413
    assert (b"connection", b"close") in request.sent[0]["headers"]


class Slow:
    """Replaces `predict` of a model by one that waits for `free`, and counts its calls."""

    def __init__(self, model, monkeypatch):
        self.free, self.calls, predict = threading.Event(), [], model.predict

        def waiting(images, threshold, **options):
            if threshold < 1:  # not the warm-up
                self.calls.append(len(images))
                assert self.free.wait(10)
            return predict(images, threshold, **options)

        monkeypatch.setattr(model, "predict", waiting)


@pytest.fixture
def slow(model, monkeypatch):
    return Slow(model, monkeypatch)


def test_requests_that_wait_share_a_batch_and_get_their_own_results(model, picture, slow):
    thresholds = [0.3, 0.0, 0.9, 0.5]
    images = [picture.rotate(90 * i) for i in range(4)]  # all of one size

    async def use(client):
        def detect(image, threshold):
            url = f"/v1/detect?threshold={threshold}"
            return asyncio.ensure_future(client.post(url, content=encoded(image), headers=RAW))

        first = detect(picture, 0.5)
        await until(lambda: slow.calls)
        tasks = [detect(*pair) for pair in zip(images, thresholds, strict=True)]
        other = detect(picture.resize((40, 60)), 0.5)
        await asyncio.sleep(0.1)
        slow.free.set()
        return await asyncio.gather(first, other, *tasks)

    _, other, *responses = serve(create_app(model), use)
    assert sorted(slow.calls) == [1, 1, 4]
    assert other.json()["times_ms"]["batch"] == 1
    for response, image, threshold in zip(responses, images, thresholds, strict=True):
        answer = check(response, model, image, threshold)
        assert answer["times_ms"]["batch"] == 4


def test_queue_is_limited(model, picture, slow):
    content = encoded(picture)

    async def use(client):
        def detect():
            return asyncio.ensure_future(client.post("/v1/detect", content=content, headers=RAW))

        accepted = [detect() for _ in range(3)]
        await until(lambda: slow.calls)
        refused = await detect()
        health = await client.get("/health")
        slow.free.set()
        statuses = [response.status_code for response in await asyncio.gather(*accepted)]
        return refused, health, statuses, await client.get("/health"), await detect()

    app = create_app(model, ServingSettings(queue=3))
    refused, health, statuses, healthy, later = serve(app, use)
    assert refused.status_code == 503
    assert int(refused.headers["Retry-After"]) >= 1
    assert "wait" in refused.json()["detail"]
    assert (health.status_code, health.json()["reason"]) == (503, "the queue is full")
    assert statuses == [200, 200, 200]
    assert healthy.json() == {"ready": True, "reason": None, "accepted": 0}
    assert later.status_code == 200


def test_requests_have_a_time_limit(model, picture, slow):
    async def main():
        app = create_app(model, ServingSettings(timeout=0.2))
        async with client_of(app) as client:
            content = encoded(picture)
            late = await client.post("/v1/detect", content=content, headers=RAW)
            await asyncio.sleep(0.05)  # decoding was part of the limit
            health = await client.get("/health")
            stalled = RawRequest(app, RAW)
            stalled.body(content[:50], more=True)
            await asyncio.wait_for(stalled.task, 5)
            slow.free.set()
            for _ in range(20):  # a busy machine may be slower than the limit
                again = await client.post("/v1/detect", content=content, headers=RAW)
                if again.status_code == 200:
                    return late, health, stalled
            raise AssertionError(again.text)

    late, health, stalled = asyncio.run(main())
    assert late.status_code == 504
    assert late.json()["detail"] == "no result within 0.2 s"
    assert "has been computing a batch" in health.json()["reason"]
    assert stalled.status == 408


def test_a_client_that_leaves_is_not_computed(model, picture, slow):
    async def main():
        app = create_app(model)
        async with client_of(app) as client:
            requests = [RawRequest(app, RAW) for _ in range(3)]
            requests[0].body(encoded(picture))
            await until(lambda: slow.calls)  # the first is in the model
            requests[1].body(encoded(picture))
            requests[2].body(b"half", more=True)
            await asyncio.sleep(0.05)
            for request in requests:
                request.leave()
            await asyncio.wait_for(asyncio.gather(*(r.task for r in requests)), 5)
            assert (await client.get("/health")).json()["accepted"] == 0
            slow.free.set()
            await client.post("/v1/detect", content=encoded(picture), headers=RAW)
            return (await client.get("/metrics")).text

    metrics = asyncio.run(main())
    assert slow.calls == [1, 1]
    assert 'cdetr_fast_requests_total{status="499"} 3.0' in metrics


def test_shutdown_answers_what_was_accepted(model, picture, slow):
    async def main():
        app = create_app(model)
        async with client_of(app) as client:
            tasks = [
                asyncio.ensure_future(
                    client.post("/v1/detect", content=encoded(picture), headers=RAW)
                )
                for _ in range(3)
            ]
            await until(lambda: slow.calls)
            await asyncio.sleep(0.05)
            threading.Timer(0.1, slow.free.set).start()
        # The application has stopped, and nothing was lost.
        return [(await task).status_code for task in tasks]

    assert asyncio.run(main()) == [200, 200, 200]


def test_an_error_of_the_model_is_one_of_its_request(model, picture, monkeypatch):
    predict = model.predict

    def failing(images, threshold, **options):
        if any(image.shape[-2:] == (13, 17) for image in images):
            raise RuntimeError("out of luck")
        return predict(images, threshold, **options)

    monkeypatch.setattr(model, "predict", failing)

    async def use(client):
        odd, even = (encoded(picture.resize(size)) for size in ((17, 13), (60, 40)))
        return [
            await client.post("/v1/detect", content=content, headers=RAW) for content in (odd, even)
        ]

    bad, good = serve(create_app(model), use)
    assert bad.status_code == 500
    assert "out of luck" in bad.json()["detail"]
    assert good.status_code == 200


def test_metrics_count_requests_and_batches(model, picture):
    async def use(client):
        for content in (encoded(picture), b"text", encoded(picture)):
            await client.post("/v1/detect", content=content, headers=RAW)
        return await client.get("/metrics")

    response = serve(create_app(model), use)
    assert response.headers["content-type"].startswith("text/plain")
    lines = dict(line.rsplit(" ", 1) for line in response.text.splitlines() if line[0] != "#")
    assert float(lines['cdetr_fast_requests_total{status="200"}']) == 2
    assert float(lines['cdetr_fast_requests_total{status="422"}']) == 1
    assert float(lines["cdetr_fast_batch_images_count"]) == 3  # one is the warm-up
    assert float(lines["cdetr_fast_accepted_requests"]) == 0
    assert float(lines["cdetr_fast_request_seconds_sum"]) > 0


def test_model_is_described(model):
    settings = ServingSettings(max_bytes=5, top_k=9)
    app = create_app(model, settings, "mine")
    found = serve(app, lambda c: c.get("/v1/model")).json()
    assert found["name"] == "mine"
    assert found["labels"] == {str(label): name for label, name in NAMES.items()}
    assert (found["max_bytes"], found["top_k"]) == (5, 9)
    schema = serve(app, lambda c: c.get("/openapi.json")).json()
    assert "multipart/form-data" in json.dumps(schema["paths"]["/v1/detect"]["post"]["requestBody"])


def test_top_k(model, picture):
    app = create_app(model, ServingSettings(top_k=2))
    assert len(post(app, encoded(picture), threshold=0.0).json()["detections"]) == 2


def test_page_loads_nothing_from_elsewhere(model):
    response = serve(create_app(model), lambda c: c.get("/"))
    assert response.headers["content-type"].startswith("text/html")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "'unsafe-inline'" not in policy.partition("style-src")[0]
    links = re.findall(r"""(?:src|href|url|import|fetch)\W*[(=]\W*([^"'`)>]+)""", response.text)
    assert [link for link in links if not link.startswith(("data:,", "v1/"))] == []
    assert "innerHTML" not in response.text  # names are text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"batch": 0}, "batch: "), ({"timeout": 0.0}, "timeout: "), ({"max_wait": -1.0}, "max_wait")],
)
def test_settings_are_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        ServingSettings(**wrong)
