"""Serves the demo, by default to this machine alone, with no request to any other."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from train.demo.limits import Limits
from train.demo.models import Models
from train.log import log

POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; "
    "style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; worker-src 'self' blob:; "
    "connect-src 'self' blob: data:; object-src 'none'; base-uri 'self'; frame-ancestors 'self'"
)


class OwnSourcesOnly:
    """ASGI middleware: browsers may fetch nothing for this page but from this server."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""

        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, with_policy if scope["type"] == "http" else send)


def serve(
    models: Sequence[str | None],
    *,
    device: torch.device,
    checkpoint: str = "latest",
    precision: str | None = None,
    limits: Limits,
    host: str = "127.0.0.1",
    port: int = 7860,
) -> None:
    """Serve until interrupted. models: names as `train.restore.names.find_model` takes them.

    ValueError where gradio is not installed, a model does not load, or the port cannot be had. Uploads and results lie
    in a folder of this process alone, which is deleted at the end.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the demo needs gradio: pip install -e '.[demo]'")
    chosen = Models(models, device, checkpoint, precision)
    folder = Path(tempfile.mkdtemp(prefix="sharpprior-demo-"))
    ended = signal.signal(signal.SIGTERM, _leave)  # a service that is stopped leaves no visitor's files either
    try:
        os.environ |= {
            "GRADIO_ANALYTICS_ENABLED": "False",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "GRADIO_TEMP_DIR": str(folder / "files"),
        }
        _launch(chosen, limits, folder, host, port)
    finally:
        signal.signal(signal.SIGTERM, ended)
        shutil.rmtree(folder, ignore_errors=True)


def _leave(number: int, _: Any) -> None:
    sys.exit(128 + number)


def _launch(models: Models, limits: Limits, folder: Path, host: str, port: int) -> None:
    import gradio as gr  # seconds; after the settings above, which it reads
    from starlette.middleware import Middleware

    from train.demo.acts import Acts
    from train.demo.app import build

    local = is_loopback(host)
    if not local:
        log.warning("--host %s: everyone who reaches this machine can use the demo", host)
    page = build(Acts(models, limits, folder), local=local)
    page.queue(max_size=limits.waiting, default_concurrency_limit=4, api_open=False)
    style = (Path(__file__).parent / "demo.css").read_text(encoding="utf-8")
    sans, mono = ["system-ui", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"], ["ui-monospace", "Menlo", "monospace"]
    theme = gr.themes.Base(primary_hue="blue", neutral_hue="slate", radius_size="md", font=sans, font_mono=mono)
    try:
        page.launch(
            server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, footer_links=[],
            run_history=False, enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False, strict_cors=True,
            max_file_size=int(limits.megabytes * 1e6), state_session_capacity=256, theme=theme,
            head=f"<style>{style}</style>",  # `css=` would drop what is for narrow screens
            app_kwargs={"middleware": [Middleware(OwnSourcesOnly)], "docs_url": None, "redoc_url": None},
        )  # fmt: skip
    except OSError as error:
        raise ValueError(f"port {port} of {host} cannot be had ({error}): choose another with --port") from None
    log.info("demo: http://%s:%d  (end it with Ctrl-C)", f"[{host}]" if ":" in host else host, port)
    try:
        page.block_thread()
    finally:
        page.close(verbose=False)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
