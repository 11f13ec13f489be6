"""Open the page on a port, and leave nothing behind."""

import os
import shutil
import socket
import tempfile
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

from ..hub.loading import CHECKPOINTS, DEFAULT, default_checkpoint, load_pipeline
from ..inference.reference_scores import cached_scores, kept_scores
from ..precision import use_dtype

WAITING = 16  # runs that may wait for the model; further ones are told to come back


@contextmanager
def temporary_folder():
    """Where Gradio puts uploads for the moment until they are read; gone with the page."""
    folder = tempfile.mkdtemp(prefix="cxr_diffusers_demo_")  # readable by its owner alone
    before = os.environ.get("GRADIO_TEMP_DIR")
    os.environ["GRADIO_TEMP_DIR"] = folder
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if before is None:
            del os.environ["GRADIO_TEMP_DIR"]
        else:
            os.environ["GRADIO_TEMP_DIR"] = before


def open_models(names=(), device=None, trust_remote_code=False, dtype="auto"):
    """{name: pipeline}: those of `names` first, then the shipped ones, the default one before the others.

    Raises:
        ValueError: a model for pictures of several channels, one that does not answer with an anomaly map, or two of
            `names` with one last part.
    """
    from ..inference.detection import model_channels
    from ..processes import process_state

    shipped = sorted((path.parent.name for path in CHECKPOINTS.glob("*/model_index.json")), key=lambda x: x != DEFAULT)
    models = {}
    for name in (*names, *shipped):
        short = DEFAULT if name == "default" else Path(name).name or Path(name).resolve().name
        if short in models and name in ("default", *shipped):
            continue
        if short in models:
            raise ValueError(f"expected models of different names, got {short} twice: {', '.join(map(str, names))}")
        pipeline = load_pipeline(name, trust_remote_code)
        if model_channels(pipeline) not in (1, 3) or not hasattr(pipeline, "settings"):
            raise ValueError(f"{name}: expected a model of anomalies in radiographs, got a {type(pipeline).__name__}")
        pipeline.set_progress_bar_config(disable=True)
        models[short] = use_dtype(pipeline.to(device or process_state().device), dtype)
    return models


def references(models, healthy=None, data=""):
    """`reference_of(name, progress)` for `build_page`: measured on the data set `healthy` when first asked for, or
    those that are kept with the model."""
    known = {}

    def reference_of(name, progress=None):
        if name not in known:
            if healthy is not None:
                known[name] = cached_scores(models[name], healthy, data, progress=progress)
            else:
                known[name] = kept_scores(source_of(models[name]))
        return known[name]

    return reference_of


def source_of(pipeline):
    """The folder or the Hub name that a pipeline was opened from."""
    return str(pipeline.config.get("_name_or_path") or default_checkpoint())


def check_port(host, port):
    """Raise ValueError where nobody can listen: the port is taken, or may not be had. None is always free."""
    if port is None:
        return
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((host, port))
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen on port {port} of {host} ({error}): give another --port, or none") from None


def launch(
    page, *, host="127.0.0.1", port=None, share=False, root_path=None, max_megabytes=64, allow_hosts=(), wait=True
):
    """Serve a page of `build_page`; -> (address, page) when `wait` is False, else when it is stopped.

    Nothing is sent anywhere, nothing is recorded, no other file can be asked for, and requests of other web sites are
    refused (`guard.Guard`).

    Args:
        allow_hosts: names, besides IP addresses and this machine's, under which the page may be asked for.
    """
    from starlette.middleware import Middleware

    from .guard import Guard
    from .page import DARK, look

    names = (*allow_hosts, *([".gradio.live"] if share else []))
    page.queue(max_size=WAITING, default_concurrency_limit=4, api_open=False)
    _, local, public = page.launch(
        server_name=host,
        server_port=port,
        share=share,
        root_path=root_path,
        max_file_size=f"{max_megabytes}mb",
        prevent_thread_lock=not wait,
        inbrowser=False,
        quiet=True,
        footer_links=[],
        run_history=False,  # which would keep pictures in the browser
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        favicon_path=str(files(__package__) / "favicon.svg"),
        mcp_server=False,
        app_kwargs={"middleware": [Middleware(Guard, hosts=names, address=host)]},
        state_session_capacity=64,
        theme=look(),
        css=(files(__package__) / "page.css").read_text(),
        js=DARK,
    )
    return public or local, page
