"""Serves the page on a port, and leaves no file behind."""

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..hub.loading import CHECKPOINTS, DEFAULT, default_checkpoint, load_pipeline
from ..inference.reference_scores import ReferenceScores, cached_scores, kept_scores
from ..precision import use_dtype

if TYPE_CHECKING:
    import gradio as gr

MAX_WAITING = 16  # runs in the queue; further ones are refused


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for Gradio's temporary copies of uploads; deleted with the page."""
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


def open_models(
    names: Sequence[str | Path] = (), device: str | None = None, trust_remote_code: bool = False, dtype: str = "auto"
) -> dict[str, Any]:
    """{name: pipeline}: those of `names` first, then the shipped ones, the default one before the others.

    Raises:
        ValueError: a model for images of several channels, one that returns no anomaly map, or two of `names` with
            the same last part; or a `device` that cannot be used.
    """
    from ..inference.detection import model_channels
    from ..processes import usable_device

    place = usable_device(device)
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
            raise ValueError(
                f"{name}: expected a model that returns anomaly maps of radiographs, got a {type(pipeline).__name__}"
            )
        pipeline.set_progress_bar_config(disable=True)
        models[short] = use_dtype(pipeline.to(place), dtype)
    return models


def references(models: Mapping[str, Any], healthy: Any = None, data: str = "") -> Callable[..., ReferenceScores | None]:
    """`reference_of(name, progress)` for `build_page`: measured on the data set `healthy` on first use, or those stored
    with the model."""
    references: dict[str, ReferenceScores | None] = {}

    def reference_of(name: str, progress: Callable[[int, int], None] | None = None) -> ReferenceScores | None:
        if name not in references:
            if healthy is not None:
                references[name] = cached_scores(models[name], healthy, data, progress=progress)
            else:
                references[name] = kept_scores(source_of(models[name]))
        return references[name]

    return reference_of


def source_of(pipeline: Any) -> str:
    """The folder or the Hub name that a pipeline was loaded from."""
    return str(pipeline.config.get("_name_or_path") or default_checkpoint())


def check_port(host: str, port: int | None) -> None:
    """Raise ValueError if the port is taken or not permitted. None, the first free port, is always possible."""
    if port is None:
        return
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((host, port))
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen on port {port} of {host} ({error}): give another --port, or none") from None


def launch(
    page: "gr.Blocks",
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    root_path: str | None = None,
    max_megabytes: int = 64,
    allow_hosts: Sequence[str] = (),
    wait: bool = True,
) -> tuple[str, "gr.Blocks"]:
    """Serve a page of `build_page`; returns (address, page) at once when `wait` is False, else when it is stopped.

    Nothing is sent to other machines, nothing is recorded, no other file can be requested, and requests of other web
    sites are refused (`guard.Guard`).

    Args:
        allow_hosts: names, besides IP addresses and the name of this machine, under which the page may be requested.
    """
    from starlette.middleware import Middleware

    from .guard import Guard
    from .page import ON_LOAD, page_theme

    names = (*allow_hosts, *([".gradio.live"] if share else []))
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=4, api_open=False)
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
        run_history=False,  # would store images in the browser
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        favicon_path=str(files(__package__) / "favicon.svg"),
        mcp_server=False,
        app_kwargs={"middleware": [Middleware(Guard, hosts=names, address=host)]},
        state_session_capacity=64,
        theme=page_theme(),
        css=(files(__package__) / "page.css").read_text(),
        js=ON_LOAD,
    )
    return public or local, page
