"""`cdetr-fast serve`: the command, and a real process with its socket and signals."""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from urllib.request import Request, urlopen

import pytest

from cdetr_fast import cli
from cdetr_fast.demo.scenes import draw_scene
from cdetr_fast.serving import server


class ClosedHandler(logging.NullHandler):
    closed = False

    def close(self):
        self.closed = True
        super().close()


def run(*arguments):
    """Return the exit code of the command."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["serve", *map(str, arguments)])
    return stop.value.code


def test_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert run("--port", port) == 1
    error = capsys.readouterr().err
    assert f"--port {port}: cannot be used (Address already in use)" in error
    assert "choose another port" in error


@pytest.mark.parametrize("host", ["192.0.2.1", "", ".example", "a" * 70])
def test_address_that_is_not_of_this_machine(capsys, host):
    assert run("--host", host, "--port", 0) == 1
    assert f"--host {host} --port 0: cannot be used (" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn"])
def test_missing_package_names_the_extra(missing, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    assert run() == 1
    assert f"{missing} missing: pip install 'cdetr-fast[serve]'" in capsys.readouterr().err


def test_wrong_model_is_reported(capsys, tmp_path):
    assert run("--port", 0, "--model", tmp_path) == 1
    assert f"--model {tmp_path}" in capsys.readouterr().err


def test_application_that_does_not_start(caplog):
    from fastapi import FastAPI

    def lifespan(app):
        raise OSError("no luck")

    handler = ClosedHandler()
    logging.getLogger("another_library").addHandler(handler)
    with server.open_socket("127.0.0.1", 0) as opened, pytest.raises(RuntimeError, match="started"):
        server.run(FastAPI(lifespan=lifespan), opened, 1.0, lambda: None)
    assert "no luck" in caplog.text
    assert not handler.closed, "the server closes handlers of other libraries"


def test_clients_that_are_silent_or_send_heads_without_end():
    from fastapi import FastAPI

    app, answers = FastAPI(), {}
    app.get("/")(lambda: "here")
    with server.open_socket("127.0.0.1", 0) as opened:
        address = opened.getsockname()

        def talk(content):
            with socket.create_connection(address, timeout=20) as client:
                client.sendall(content)
                received = b""
                with contextlib.suppress(ConnectionError):  # what was not read resets it
                    while part := client.recv(4096):
                        received += part
                return received.decode()

        def clients():
            try:
                head = b"GET / HTTP/1.1\r\nHost: x\r\n"
                answers["silent"] = talk(b"")
                answers["half a head"] = talk(head)
                answers["half of the next"] = talk(head + b"\r\nGET / HTT")
                answers["endless head"] = talk(head + b"X: " + b"x" * 200_000)
                answers["good"] = talk(head + b"Connection: close\r\n\r\n")
            finally:
                os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=clients)
        server.run(app, opened, 0.3, thread.start)
        thread.join()
    assert answers["silent"] == answers["half a head"] == ""
    assert answers["half of the next"].endswith('here"')
    assert answers["endless head"].partition("\r\n")[0] in ("HTTP/1.1 400 Bad Request", "")
    assert answers["good"].startswith("HTTP/1.1 200 OK")


def test_socket_is_on_the_address_and_v6():
    with server.open_socket("127.0.0.1", 0) as opened:
        assert opened.getsockname()[0] == "127.0.0.1"
    if socket.has_ipv6:
        try:
            opened = server.open_socket("::1", 0)
        except OSError:
            pytest.skip("this machine has no IPv6 loopback address")
        opened.close()


@pytest.mark.slow
def test_process_answers_concurrent_clients_and_stops_when_it_is_told_to(tmp_path, root):
    """Among good requests bad ones and clients that leave; SIGTERM while requests are computed."""
    path = tmp_path / "photo.png"
    draw_scene(7, (120, 160))[0].save(path)
    content = path.read_bytes()
    folders = [str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        [sys.executable, "-m", "cdetr_fast", "serve", "--port", "0", "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"},
    )
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("http"):
                break
        url = lines[-1].split()[0]
        assert url.startswith("http://127.0.0.1:"), lines

        def detect(body=content, kind="image/png"):
            request = Request(f"{url}/v1/detect?threshold=0", body, {"Content-Type": kind})
            with urlopen(request, timeout=60) as response:
                return json.load(response)["detections"]

        expected = detect()
        assert expected
        found, failures = [], []

        def client(i):
            try:
                if i % 4 == 1:
                    with pytest.raises(OSError, match="422"):
                        detect(b"not an image")
                elif i % 4 == 2:
                    host, port = url.removeprefix("http://").split(":")
                    with socket.create_connection((host, int(port))) as half:
                        half.sendall(b"POST /v1/detect HTTP/1.1\r\nHost: x\r\nContent-Type: ")
                        half.sendall(b"image/png\r\nContent-Length: 9999\r\n\r\nhalf")
                elif i % 4 == 3:
                    with pytest.raises(OSError, match=r"413|reset|[Pp]ipe"):
                        detect(bytes(20_000_001))
                else:
                    found.append(detect())
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=client, args=(i,)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert len(found) == 4

        late = [threading.Thread(target=client, args=(0,)) for _ in range(6)]
        for thread in late:
            thread.start()
        while json.load(urlopen(f"{url}/health"))["accepted"] == 0 and len(found) < 10:
            pass
        process.send_signal(signal.SIGTERM)
        for thread in late:
            thread.join()
        refused = [error for error in failures if "refused" in str(error) or "reset" in str(error)]
        assert failures == refused  # those that came too late
        assert len(found) + len(refused) == 10
        assert len(found) > 4
        for answer in found:
            assert [d["label"] for d in answer] == [d["label"] for d in expected]
        assert process.wait(30) == 0
        assert "Traceback" not in process.stdout.read()
    finally:
        process.kill()
        process.stdout.close()
