"""cxr-diffusers demo: the web page."""

import argparse
from typing import Any

from .options import add_command, add_device_options, keyword_options

DEMO = """\
examples:
  cxr-diffusers demo
  cxr-diffusers demo --model runs/chexpert_cfg_256 --healthy /data/healthy
  cxr-diffusers demo --port 8080 --root-path /cxr --allow-host xray.example.org     # behind a proxy with a password

It needs pip install 'cxr_diffusers[demo]'. Uploads are read into memory and deleted at once; see
docs/demo.md.
"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    demo = add_command(commands, "demo", run, "a web page: drop a radiograph, see where it is abnormal", DEMO)
    demo.add_argument(
        "--model",
        nargs="+",
        action="extend",
        default=[],
        help="folders or Hub names, offered before the shipped models",
    )
    demo.add_argument("--trust-remote-code", action="store_true", help="run the code in a Hub model's repository")
    add_device_options(demo)
    demo.add_argument(
        "--healthy",
        metavar="DATA",
        help="healthy images to compare the score with, as for evaluate (default: the scores stored with the model)",
    )
    demo.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    demo.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    demo.add_argument(
        "--share", action="store_true", help="a public address through Gradio's servers: NOT for patient data"
    )
    demo.add_argument("--root-path", help="the path under which a proxy serves it, e.g. /cxr")
    text = "a name under which a proxy serves it, besides IP addresses and the name of this machine; repeatable"
    demo.add_argument("--allow-host", dest="allow_hosts", metavar="NAME", action="append", default=[], help=text)
    demo.add_argument("--max-megabytes", type=int, default=64, help="limit of an upload (default: 64)")
    demo.add_argument("--max-megapixels", type=float, default=40, help="limit of an image (default: 40)")


def run(options: argparse.Namespace) -> None:
    """Serve the page until a signal."""
    import signal
    import sys
    import threading

    from ..demo.page import build_page  # first: its ImportError says what to install
    from ..demo.serve import check_port, launch, open_models, references, temporary_folder

    check_port(options.host, options.port)
    healthy = None
    if options.healthy:
        from ..data import open_dataset
        from ..inference.reference_scores import readable_healthy

        healthy, _ = readable_healthy(open_dataset(options.healthy), options.healthy)
    models = open_models(options.model, options.device, options.trust_remote_code, options.dtype)
    data = f"{len(healthy)} images given with --healthy" if healthy is not None else ""
    reference_of = references(models, healthy, data)
    reference_of(next(iter(models)))  # measured before the first visitor waits for it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that a stopped service deletes its folder, too
    with temporary_folder():
        page = build_page(models, reference_of, options.max_megapixels)
        address, _ = launch(page, **keyword_options(options, launch, wait=False))
        print(f"{address}    (Ctrl-C stops it)    Research use only. Not for diagnosis.", flush=True)
        if options.host not in ("127.0.0.1", "localhost", "::1"):
            print(
                "Anybody who can reach this port can use the page: put it behind a proxy with a password.", flush=True
            )
        try:
            threading.Event().wait()  # until a signal
        finally:
            page.close(verbose=False)
