"""The web page as people have it: `cxr-diffusers demo` in a process of its own, and a real browser."""

import base64
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from cxr_diffusers.files import as_json
from cxr_diffusers.fingerprints import weights_digest
from cxr_diffusers.inference.reference_scores import ReferenceScores, keep_scores
from cxr_diffusers.pipelines.cxr_images import restore_map
from cxr_diffusers.visualization import overlay
from helpers import TEN_STEPS, chest, picture_of

ROOT = Path(__file__).parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()

# what the server's process connects to is written down, so that nobody has to take our word for it
SERVER = """
import sys
def audit(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        print("CONNECT", arguments[1][0], file=sys.stderr, flush=True)
sys.addaudithook(audit)
from cxr_diffusers.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def toy(pipeline):
    pipeline.register_to_config(settings=TEN_STEPS, map_threshold=0.02)
    return pipeline


@pytest.fixture
def server(toy, tmp_path):
    toy.save_pretrained(tmp_path / "toy")
    keep_scores(ReferenceScores("2 toys", as_json(toy.settings()), [0.0, 0.9], weights_digest(toy)), tmp_path / "toy")
    (tmp_path / "tmp").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path / "tmp")}
    command = [sys.executable, "-c", SERVER, "demo", "--model", str(tmp_path / "toy"), "--port", str(port)]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([*command, "--device", "cpu"], env=environment, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 180
        while process.poll() is None and time.monotonic() < end and "Ctrl-C" not in (tmp_path / "log").read_text():
            time.sleep(0.2)
        assert "Ctrl-C" in (tmp_path / "log").read_text(), (tmp_path / "log").read_text()[-3000:]
        yield SimpleNamespace(
            url=f"http://127.0.0.1:{port}", process=process, log=tmp_path / "log", temporary=tmp_path / "tmp"
        )
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    pytest.importorskip("gradio", reason="pip install 'cxr_diffusers[demo]'")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


def test_in_a_real_browser_a_radiograph_becomes_a_map_and_nothing_leaves_the_machine(browser, server, toy, tmp_path):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(30_000)
    errors, requests = [], []
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(server.url)
    page.wait_for_selector("#samples button")
    assert page.locator("#notice").inner_text().startswith("Research use only. Not for diagnosis.")
    assert "Gradio" not in page.inner_text("body") and page.title() == "Where is this chest X-ray abnormal?"

    # a file that is none, and no file
    (tmp_path / "text.png").write_text("no picture")
    page.set_input_files("#drop input[type=file]", tmp_path / "text.png")
    page.wait_for_selector("#message [role=alert] >> text=text.png cannot be read as a picture")
    page.click("#start")
    page.wait_for_selector("#message [role=alert] >> text=Choose a radiograph first")

    # a sample, by a click; then a file of 16 bits, by dropping it
    page.click("#samples button >> nth=2")
    page.wait_for_selector("#chosen >> text=sample_3.png")
    Image.fromarray(chest(kind=np.uint16)).save(tmp_path / "chest.png")
    page.set_input_files("#drop input[type=file]", tmp_path / "chest.png")
    page.wait_for_selector("#chosen >> text=chest.png")
    page.click("#start")
    page.wait_for_selector("#score")
    output = toy(Image.fromarray(chest(kind=np.uint16)), output_type="np")
    own = restore_map(output.anomaly_map[0], 60, 50)
    assert float(page.inner_text("#score")) == pytest.approx(float(output.anomaly_score[0]), abs=2e-3)
    assert "1 of 2" in page.inner_text("#score-card") and "2 toys" in page.inner_text("#score-card")
    for picture in ("#viewer .input img", "#viewer .other img", "#film .film", "#film .strip img"):
        assert page.eval_on_selector(picture, "picture => picture.decode().then(() => picture.naturalWidth)") > 300
    assert page.locator("#compare img").count() >= 2

    # the sliders act without the server
    above = int(page.get_attribute("#viewer canvas", "data-above"))
    asked = len(requests)
    set_slider(page, "#times", 2)
    page.wait_for_function("n => Number(document.querySelector('#viewer canvas').dataset.above) < n", arg=above)
    set_slider(page, "#times", 0)
    page.wait_for_function("n => Number(document.querySelector('#viewer canvas').dataset.above) > n", arg=above)
    assert [url for url in requests[asked:] if "queue/join" in url or "/run/" in url] == []
    compare_canvas(page, toy, output)

    # downloads
    saved = {kind: download(page, kind, tmp_path) for kind in ("map", "mask", "film")}
    found = np.asarray(Image.open(saved["map"]), np.float32) / 65535
    np.testing.assert_allclose(found, own, atol=1e-4)
    assert np.mean((np.asarray(Image.open(saved["mask"])) > 0) != (own > 0)) < 0.01
    assert Image.open(saved["film"]).n_frames == 6

    # a phone: nothing is wider than the screen
    page.set_viewport_size({"width": 400, "height": 850})
    assert page.evaluate("document.documentElement.scrollWidth") == 400

    assert errors == []
    assert len(requests) > 10 and not [u for u in requests if not u.startswith((server.url, "data:", "blob:"))]
    [folder] = server.temporary.glob("cxr_diffusers_demo_*")
    left = [path for path in server.temporary.rglob("*") if path.is_file() and path.stat().st_size]
    assert left == [], "an upload is off the disk as soon as it is read, and nobody else has left a note"
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0 and not folder.exists()
    connected = set(re.findall(r"CONNECT (\S+)", server.log.read_text()))
    assert connected <= {"127.0.0.1", "::1", "localhost"}, connected


def set_slider(page, selector, value):
    box = page.locator(f"{selector} input[type=number]")
    box.fill(str(value))
    box.press("Enter")


def compare_canvas(page, toy, output):
    """At threshold 0 the canvas is `overlay`, but for the outline."""
    uri = page.eval_on_selector("#viewer canvas", "canvas => canvas.toDataURL()")
    canvas = np.asarray(picture_of(base64.b64decode(uri.split(",")[1])).convert("RGB"), int)
    shown = page.eval_on_selector("#viewer .input img", "picture => picture.src")
    grey = picture_of(base64.b64decode(shown.split(",")[1]))
    small = restore_map(output.anomaly_map[0], *canvas.shape[:2])
    expected = np.asarray(overlay(grey, small, vmax=3 * toy.config.map_threshold), int)
    assert np.mean(np.abs(canvas - expected).max(-1) > 4) < 0.08
    assert np.ptp(canvas, axis=-1).max() > 60, "there is colour on it"


def download(page, kind, folder):
    with page.expect_download() as coming:
        page.click(f"#get-{kind}")
    coming.value.save_as(folder / coming.value.suggested_filename)
    return folder / coming.value.suggested_filename
