"""The web page in a real browser, served by `cxr-diffusers demo` in its own process.

One server and one browser serve the whole module; the last test stops the server.
"""

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
from diffusers import DDIMScheduler
from PIL import Image

from cxr_diffusers import CFGAnomalyPipeline
from cxr_diffusers.files import as_json
from cxr_diffusers.fingerprints import weights_digest
from cxr_diffusers.inference.reference_scores import ReferenceScores, keep_scores
from cxr_diffusers.pipelines.cxr_images import restore_map
from cxr_diffusers.visualization import overlay
from helpers import TEN_STEPS, chest, picture_of, toy_unet, write_dicom

ROOT = Path(__file__).parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()

# logs every connection of the server's process
SERVER = """
import sys
def audit(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        print("CONNECT", arguments[1][0], file=sys.stderr, flush=True)
sys.addaudithook(audit)
from cxr_diffusers.cli import main
sys.exit(main(sys.argv[1:]))
"""


TARGETS = """() => [...document.querySelectorAll("button, a, input, [role=option]")]
  .filter((e) => e.offsetParent && e.type !== "file")
  .map((e) => [e.id || e.ariaLabel || e.className, e.getBoundingClientRect()])
  .filter(([_, r]) => r.width < 44 || r.height < 44 || r.left < 0 || r.right > innerWidth)
  .map(([name, r]) => `${name}: ${r.width} x ${r.height}, ${r.left} to ${r.right}`)"""
# the lines that a copy of a button needs for a label, 0 where the label is wider than the button
LINES = """([selector, label]) => {
  const button = document.querySelector(selector), copy = button.cloneNode();
  copy.textContent = label;
  Object.assign(copy.style, {flex: "none", position: "absolute", width: `${button.offsetWidth}px`});
  button.parentNode.append(copy);
  const range = document.createRange();
  range.selectNodeContents(copy);
  const lines = new Set([...range.getClientRects()].map((r) => Math.round(r.top))).size;
  const fits = range.getBoundingClientRect().width <= button.clientWidth;
  copy.remove();
  return fits ? lines : 0;
}"""
UPLOADS = 200  # of the soak test
WIDTH = "document.documentElement.scrollWidth"
JARGON = ("latent", "inversion", "decoding", "guidance", "counterfactual", "cxr_cfg", "w:", "classifier")


def toy_pipeline(settings, **unet):
    pipeline = CFGAnomalyPipeline(
        toy_unet(**unet),
        DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False),
        ["healthy", "pleural effusion"],
        settings=settings,
        map_threshold=0.02,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def toy():
    return toy_pipeline(TEN_STEPS)


@pytest.fixture(scope="module")
def server(toy, tmp_path_factory):
    """A server with three models: "toy", of six steps; "slow", which takes five minutes; "broken", which fails."""
    folder = tmp_path_factory.mktemp("server")
    toy.save_pretrained(folder / "toy")
    keep_scores(ReferenceScores("2 toys", as_json(toy.settings()), [0.0, 0.9], weights_digest(toy)), folder / "toy")
    toy_pipeline({"num_inference_steps": 1000, "noise_level": 900}, sample_size=128).save_pretrained(folder / "slow")
    toy.save_pretrained(folder / "broken")
    (folder / "broken" / "healthy_scores.json").write_text('{"unexpected": 1}')
    (folder / "tmp").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "tmp")}
    command = [sys.executable, "-c", SERVER, "demo", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    command += ["--model", *(str(folder / name) for name in ("toy", "slow", "broken"))]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 600  # a busy machine
        while process.poll() is None and time.monotonic() < end and "Ctrl-C" not in (folder / "log").read_text():
            time.sleep(0.2)
        assert "Ctrl-C" in (folder / "log").read_text(), (folder / "log").read_text()[-3000:]
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}", process=process, log=folder / "log", tmp=folder / "tmp")
    finally:
        process.kill()
        process.wait(timeout=60)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    pytest.importorskip("gradio", reason="pip install 'cxr_diffusers[demo]'")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, server):
    """`open_page(**context options)`; no page may log an error or send a request to another machine."""
    pages, errors, requests = [], [], []

    def open_page(**options):
        page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}, **options})
        pages.append(page)
        page.set_default_timeout(240_000)  # a busy machine
        page.on("console", lambda entry: errors.append(entry.text) if entry.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.requests = requests
        page.goto(server.url)
        page.wait_for_selector("#samples button")
        return page

    yield open_page
    for page in pages:
        page.close()
    assert errors == []
    assert len(requests) > 10 and not [u for u in requests if not u.startswith((server.url, "data:", "blob:"))]


def upload_chest(page, folder):
    Image.fromarray(chest(dtype=np.uint16)).save(folder / "chest.png")
    page.set_input_files("#drop input[type=file]", folder / "chest.png")
    page.wait_for_selector("#chosen >> text=chest.png")


def choose_method(page, name):
    if not page.locator("#method input").is_visible():
        page.click("#settings > button")
    page.click("#method input")
    page.click(f"[role=option] >> text={name}")
    page.wait_for_selector(f"#settings code >> text={name}")


def test_an_uploaded_radiograph_becomes_a_map_with_sliders_and_downloads(open_page, server, toy, tmp_path):
    page = open_page()
    assert page.locator("#notice").inner_text().startswith("Research use only. Not for diagnosis.")
    assert "Gradio" not in page.inner_text("body") and page.title() == "Where is this chest X-ray abnormal?"

    # a sample, by a click; then a 16-bit file, by dropping it
    page.click("#samples button >> nth=2")
    page.wait_for_selector("#chosen >> text=sample_3.png")
    upload_chest(page, tmp_path)
    page.click("#start")
    page.wait_for_selector("#score")
    output = toy(Image.fromarray(chest(dtype=np.uint16)), output_type="np")
    own = restore_map(output.anomaly_map[0], 60, 50)
    assert float(page.inner_text("#score")) == pytest.approx(float(output.anomaly_score[0]), abs=2e-3)
    assert page.inner_text("#headline").startswith("Higher than 1 of 2 healthy images (p = .67)")
    assert "2 toys" in page.inner_text("#comparison") and "chest.png" in page.inner_text("#headline")
    for image in ("#viewer .input img", "#viewer .healthy img", "#film .film", "#film .strip img"):
        page.wait_for_selector(image)
        assert page.eval_on_selector(image, "image => image.decode().then(() => image.naturalWidth)") > 300
    page.wait_for_selector("#compare img")
    assert page.locator("#compare img").count() >= 2

    # the sliders work without the server
    above = int(page.get_attribute("#viewer canvas", "data-above"))
    number = len(page.requests)
    set_slider(page, "#factor", 2)
    page.wait_for_function("n => Number(document.querySelector('#viewer canvas').dataset.above) < n", arg=above)
    set_slider(page, "#factor", 0)
    page.wait_for_function("n => Number(document.querySelector('#viewer canvas').dataset.above) > n", arg=above)
    assert [url for url in page.requests[number:] if "queue/join" in url or "/run/" in url] == []
    compare_canvas(page, toy, output)

    # downloads
    saved = {name: download(page, name, tmp_path) for name in ("map", "mask", "panels", "film")}
    np.testing.assert_allclose(np.asarray(Image.open(saved["map"]), np.float32) / 65535, own, atol=1e-4)
    assert np.mean((np.asarray(Image.open(saved["mask"])) > 0) != (own > 0)) < 0.01
    assert Image.open(saved["panels"]).width > 3 * 400 and Image.open(saved["film"]).n_frames == 6

    files = [path for path in server.tmp.rglob("*") if path.is_file() and path.stat().st_size]
    assert files == [], "an upload is deleted as soon as it is read"


def test_on_a_phone_the_answer_comes_into_view_and_every_target_fits_a_finger(open_page, tmp_path):
    page = open_page(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    first_view = page.inner_text("body").lower()
    assert [word for word in JARGON if word in first_view] == []
    box = page.locator("#start").bounding_box()
    assert box["y"] + box["height"] < page.locator("#notice").bounding_box()["y"], "the button is in the first view"
    assert page.evaluate(TARGETS) == [] and page.evaluate(WIDTH) == 390
    upload_chest(page, tmp_path)
    page.tap("#start")
    page.wait_for_selector("#headline")
    page.wait_for_function("() => Math.abs(document.querySelector('#headline').getBoundingClientRect().top) < 60")
    canvas = page.locator("#viewer canvas").bounding_box()
    assert 0 < canvas["y"] < 400 and canvas["width"] > 300, "headline and map are in view together"
    page.wait_for_selector("#film .film")
    order = ["#headline", "#viewer canvas", "#viewer .input", "#get-map", "#compare", "#comparison", "#film"]
    tops = [page.locator(part).bounding_box()["y"] for part in order]
    assert tops == sorted(tops)
    page.tap("#settings > button")
    page.wait_for_selector("#method input")
    assert page.evaluate(TARGETS) == [] and page.evaluate(WIDTH) == 390
    page.set_viewport_size({"width": 320, "height": 700})
    assert page.evaluate(WIDTH) == 320


def test_the_reason_of_a_refusal_stays_until_the_next_file(open_page, tmp_path):
    page = open_page()
    page.click("#samples button >> nth=0")
    page.wait_for_selector("#chosen >> text=sample_1.png")
    (tmp_path / "text.png").write_text("no image")
    page.set_input_files("#drop input[type=file]", tmp_path / "text.png")
    page.wait_for_selector("#message [role=alert] >> text=text.png cannot be read as an image")
    page.click("#start")
    page.wait_for_selector("#status [role=alert] >> text=Choose a radiograph first")
    assert "text.png cannot be read" in page.inner_text("#message")
    Image.new("L", (90, 90), 200).save(tmp_path / "blank.png")
    page.set_input_files("#drop input[type=file]", tmp_path / "blank.png")
    page.wait_for_selector("#message [role=alert] >> text=got one value in all 8,100 pixels")
    write_dicom(tmp_path / "lateral.dcm", chest(dtype=np.uint16), 16, ViewPosition="LL")
    page.set_input_files("#drop input[type=file]", tmp_path / "lateral.dcm")
    page.wait_for_selector("#message .warning >> text=LL")
    page.click("#start")
    page.wait_for_selector("#headline .warning >> text=LL")
    assert not page.locator("#status").is_visible() and page.locator("#message [role=alert]").count() == 0


@pytest.mark.parametrize("key", ["Tab", "Escape"])
def test_the_list_of_methods_closes_on(key, open_page):
    page = open_page()
    page.click("#settings > button")
    page.click("#method input")
    page.wait_for_selector("[role=option]")
    page.keyboard.press(key)
    page.wait_for_selector("[role=listbox]", state="detached")
    page.wait_for_timeout(300)
    assert page.locator("[role=option]").count() == 0
    on_method = page.evaluate("document.activeElement.closest('#method') !== null")
    assert on_method == (key == "Escape"), "Tab goes on to the next element"


def test_the_steps_of_a_run_are_shown_live_and_stop_ends_it(open_page, tmp_path):
    page = open_page()
    choose_method(page, "slow")
    upload_chest(page, tmp_path)
    page.click("#start")
    page.wait_for_selector("#live .step >> text=of 1800: adding noise")
    page.wait_for_function("() => /^Step [0-9]+ of 1800$/.test(document.querySelector('#start').innerText)")
    page.wait_for_function("() => Number(document.querySelector('#live .step').dataset.step) > 1")
    assert page.locator("#start").is_disabled() and not page.locator("#answer").is_visible()
    for label in ("Waiting for the model \u2026", "Healthy image 100 of 100"):  # in one line, beside the Stop button
        assert page.evaluate(LINES, ["#start", label]) == 1 and page.evaluate(LINES, ["#stop", "Stop"]) == 1
    assert page.locator("#live img").count() == 2
    assert page.eval_on_selector("#live img", "image => image.decode().then(() => image.naturalWidth)") == 320
    (tmp_path / "text.png").write_text("no image")
    page.set_input_files("#drop input[type=file]", tmp_path / "text.png")
    page.wait_for_selector("#message [role=alert] >> text=text.png cannot be read")
    page.click("#stop")
    page.wait_for_selector("#status >> text=Stopped.")
    page.wait_for_timeout(500)  # a late step may not disable the button again
    assert page.inner_text("#start") == "Find what is abnormal" and page.locator("#start").is_enabled()
    assert not page.locator("#stop").is_visible() and not page.locator("#live").is_visible()
    assert "text.png cannot be read" in page.inner_text("#message") and page.locator("#score").count() == 0
    upload_chest(page, tmp_path)
    choose_method(page, "toy")
    page.click("#start")
    page.wait_for_selector("#score", timeout=120_000)  # the slow run takes five minutes


def test_after_a_failed_run_an_error_is_shown_and_the_button_works(open_page, tmp_path):
    page = open_page()
    choose_method(page, "broken")
    upload_chest(page, tmp_path)
    page.click("#start")
    page.wait_for_selector("#status [role=alert] >> text=The run failed")
    assert page.inner_text("#start") == "Find what is abnormal" and page.locator("#start").is_enabled()
    assert not page.locator("#live").is_visible() and page.locator("#score").count() == 0
    choose_method(page, "toy")
    page.click("#start")
    page.wait_for_selector("#score")


def test_closing_the_browser_ends_its_run(open_page, tmp_path):
    page = open_page()
    choose_method(page, "slow")
    upload_chest(page, tmp_path)
    page.click("#start")
    page.wait_for_selector("#live .step >> text=of 1800")
    page.close()
    page = open_page()
    upload_chest(page, tmp_path)
    page.click("#start")
    page.wait_for_selector("#score", timeout=120_000)  # the slow run takes five minutes


@pytest.mark.slow
def test_two_hundred_uploads_each_get_an_answer_or_a_reason_in_flat_memory(open_page, server, tmp_path):
    page = open_page()
    rng = np.random.default_rng(0)
    memory, seconds = [], []
    for i in range(UPLOADS):
        path, readable = write_soak_file(tmp_path, i, rng)
        start = time.monotonic()
        page.set_input_files("#drop input[type=file]", path)
        if readable:
            page.wait_for_selector(f"#chosen >> text={path.name}", timeout=30_000)
            page.click("#start")
            page.wait_for_selector(f"#headline .source >> text={path.name}", timeout=30_000)
        else:
            page.wait_for_selector(f"#message [role=alert] >> text={path.name}", timeout=30_000)
        seconds.append(time.monotonic() - start)
        path.unlink()
        memory.append(resident_megabytes(server.process.pid))
    first, last = memory[UPLOADS // 4], memory[-1]
    print(f"slowest {max(seconds):.1f} s, memory {first:.0f} MB after a quarter, {last:.0f} MB at the end")
    assert last < first + 60, memory[::10]
    assert [path for path in server.tmp.rglob("*") if path.is_file() and path.stat().st_size] == []


def write_soak_file(folder, i, rng):
    """Write an upload of one of ten sorts; returns (path, whether the page can read it)."""
    sort, deep = i % 10, chest(dtype=np.uint16)
    path = folder / f"file{i}.png"
    if sort in (0, 1):
        Image.fromarray(np.roll(chest(), int(rng.integers(50)), 1)).save(path)
    elif sort == 2:
        path = folder / f"file{i}.jpg"
        Image.fromarray(chest()).resize((1500, 1800)).save(path)
    elif sort == 3:
        path = folder / f"file{i}.dcm"
        write_dicom(path, deep, 16, ViewPosition="LL" if rng.random() < 0.5 else "PA")
    elif sort == 4:
        Image.fromarray(deep).save(path)
    elif sort == 5:
        path.write_bytes(rng.bytes(5000))
    elif sort == 6:
        Image.fromarray(deep).save(path)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    elif sort == 7:
        Image.new("L", (200, 200), int(rng.integers(255))).save(path)
    elif sort == 8:
        Image.fromarray(rng.integers(0, 255, (90, 90, 3)).astype(np.uint8)).save(path)
    else:
        path = folder / f"file{i}.dcm"
        path.write_bytes(b"\0" * 128 + b"DICM" + rng.bytes(2000))
    return path, sort < 5


def resident_megabytes(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


def test_a_stopped_server_leaves_no_file_and_has_connected_to_no_other_machine(server):
    [folder] = server.tmp.glob("cxr_diffusers_demo_*")
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0 and not folder.exists()
    addresses = set(re.findall(r"CONNECT (\S+)", server.log.read_text()))
    assert addresses <= {"127.0.0.1", "::1", "localhost"}, addresses


def set_slider(page, selector, value):
    box = page.locator(f"{selector} input[type=number]")
    box.fill(str(value))
    box.press("Enter")


def compare_canvas(page, toy, output):
    """At threshold 0 the canvas is `overlay`, except for the outline."""
    uri = page.eval_on_selector("#viewer canvas", "canvas => canvas.toDataURL()")
    canvas = np.asarray(picture_of(base64.b64decode(uri.split(",")[1])).convert("RGB"), int)
    uri = page.eval_on_selector("#viewer .input img", "image => image.src")
    grey = picture_of(base64.b64decode(uri.split(",")[1]))
    display_map = restore_map(output.anomaly_map[0], *canvas.shape[:2])
    expected = np.asarray(overlay(grey, display_map, vmax=3 * toy.config.map_threshold), int)
    assert np.mean(np.abs(canvas - expected).max(-1) > 4) < 0.08
    assert np.ptp(canvas, axis=-1).max() > 60, "there is colour on it"


def download(page, name, folder):
    with page.expect_download() as event:
        page.click(f"#get-{name}")
    event.value.save_as(folder / event.value.suggested_filename)
    return folder / event.value.suggested_filename
