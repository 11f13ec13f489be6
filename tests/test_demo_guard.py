"""Raw requests to the server of the page: other web sites, incomplete uploads, decompression bombs."""

import socket
import time
from types import SimpleNamespace

import numpy as np
import pytest
from diffusers import DDIMScheduler
from PIL import Image

from cxr_diffusers import CFGAnomalyPipeline
from cxr_diffusers.demo.uploads import read_upload
from helpers import TEN_STEPS, toy_unet

pytest.importorskip("gradio", reason="pip install 'cxr_diffusers[demo]'")

MULTIPART = "Content-Type: multipart/form-data; boundary=x"
UPLOAD = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'


@pytest.fixture(scope="module")
def server():
    """A page that refuses an upload after a pause of half a second: its port and its temporary folder."""
    from cxr_diffusers.demo import guard, serve
    from cxr_diffusers.demo.page import build_page

    toy = CFGAnomalyPipeline(toy_unet(), DDIMScheduler(clip_sample=False), ["healthy", "effusion"], settings=TEN_STEPS)
    with pytest.MonkeyPatch.context() as patch, serve.temporary_folder() as folder:
        patch.setattr(guard.Guard.__init__, "__defaults__", ((), 0.5, 2, "localhost"))
        page = build_page({"toy": toy}, lambda name, progress: None)
        serve.launch(page, allow_hosts=["xray.example.org"], wait=False)
        yield SimpleNamespace(port=page.server_port, folder=folder)
        page.close(verbose=False)


@pytest.fixture
def port(server):
    """The port of the server, with an empty temporary folder."""
    yield server.port, server.folder
    for path in server.folder.rglob("*"):
        if path.is_file():
            path.unlink()


def answer(port, *lines, body=b"", length=None):
    """(status, whole response, seconds) of a request given as raw lines."""
    start = time.monotonic()
    head = [*lines, f"Content-Length: {len(body) if length is None else length}", "Connection: close", "", ""]
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall("\r\n".join(head).encode() + body)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
    text = b"".join(parts)
    return int(text.split()[1]), text, time.monotonic() - start


def test_the_page_is_refused_under_a_foreign_host_name(port):
    port, _ = port
    for host in (f"127.0.0.1:{port}", "localhost", f"LOCALHOST:{port}", f"[::1]:{port}", "xray.example.org"):
        assert answer(port, "GET / HTTP/1.1", f"Host: {host}")[0] == 200, host
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "localhost.evil.example", "", "["):
        status, text, _ = answer(port, "GET / HTTP/1.1", f"Host: {host}")
        assert status in (400, 403) and b"evil" not in text and b"radiograph" not in text.lower(), host


def test_uploads_and_runs_from_other_sites_are_refused(port):
    port, folder = port
    body = UPLOAD + b"content\r\n--x--\r\n"
    request = [
        "POST /gradio_api/upload HTTP/1.1",
        f"Host: 127.0.0.1:{port}",
        "Content-Type: multipart/form-data; boundary=x",
    ]
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", f"http://127.0.0.1:{port}.evil.example"):
        assert answer(port, *request, f"Origin: {origin}", body=body)[0] == 403, origin
        assert answer(port, "POST /gradio_api/queue/join HTTP/1.1", request[1], f"Origin: {origin}")[0] == 403
        forwarded = f"X-Forwarded-Host: {origin.split('/')[-1]}"
        assert answer(port, *request, f"Origin: {origin}", forwarded, body=body)[0] == 403, (
            "a site can set this header as well"
        )
    assert not [path for path in folder.rglob("*") if path.is_file()]
    assert answer(port, *request, f"Origin: http://127.0.0.1:{port}", body=body)[0] == 200
    proxied = [request[0], "Host: xray.example.org", request[2], "X-Forwarded-Host: xray.example.org:8443"]
    assert answer(port, *proxied, "Origin: https://xray.example.org:8443", body=body)[0] == 200


def test_an_incomplete_upload_times_out_and_leaves_no_file(port):
    port, folder = port
    request = [
        "POST /gradio_api/upload HTTP/1.1",
        f"Host: 127.0.0.1:{port}",
        "Content-Type: multipart/form-data; boundary=x",
    ]
    status, text, seconds = answer(port, *request, body=UPLOAD + b"half", length=10**6)
    assert status == 400 and b"took too long" in text and 0.4 < seconds < 10
    assert not [path for path in folder.rglob("*") if path.is_file()]


def test_a_jpeg_of_too_many_scans_is_refused_before_it_is_decoded(tmp_path):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (2000, 3000), dtype=np.uint8)).convert("RGB")
    image.save(tmp_path / "scans.jpg", progressive=True)
    content = (tmp_path / "scans.jpg").read_bytes()
    last = content.rindex(b"\xff\xda")
    (tmp_path / "scans.jpg").write_bytes(content[:-2] + content[last:-2] * 90 + content[-2:])
    start = time.monotonic()
    with pytest.raises(ValueError, match="scans.jpg cannot be read as an image: expected at most 83 scans"):
        read_upload(tmp_path / "scans.jpg")
    assert time.monotonic() - start < 2
