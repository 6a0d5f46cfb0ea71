"""How the demo is served: to whom, with which limits, and what is said where it cannot be."""

import os
import socket
from pathlib import Path

import pytest
import torch

from train.demo import serve as serving
from train.demo.limits import Limits
from train.demo.serve import is_loopback, serve

SETTINGS = ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY", "GRADIO_TEMP_DIR")


@pytest.fixture
def launched(monkeypatch, tmp_path) -> dict:
    """What gradio is told by `serve`, which serves nothing here."""
    import gradio as gr

    for name in SETTINGS:
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(serving.tempfile, "tempdir", str(tmp_path))
    told: dict = {}

    def launch(page, **settings):
        told.update(settings, page=page, folder=Path(os.environ["GRADIO_TEMP_DIR"]))
        assert told["folder"].parent.is_dir()
        assert told["folder"].parent.stat().st_mode & 0o077 == 0

    monkeypatch.setattr(gr.Blocks, "launch", launch)
    monkeypatch.setattr(gr.Blocks, "block_thread", lambda page: None)
    monkeypatch.setattr(gr.Blocks, "close", lambda page, verbose: None)
    return told


def test_limits_reach_the_server_and_nothing_is_shared(model_file, launched):
    serve([str(model_file)], device=torch.device("cpu"), limits=Limits(3, 1, 5, 7), port=7777)
    assert launched["server_name"] == "127.0.0.1"
    assert launched["server_port"] == 7777
    assert launched["max_file_size"] == 3_000_000
    assert launched["page"]._queue.max_size == 5
    assert launched["page"].analytics_enabled is False
    assert launched["page"].delete_cache == (60, 420)
    for name in ("share", "run_history", "enable_monitoring", "ssr_mode", "pwa", "mcp_server"):
        assert launched[name] is False, name
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert not launched["folder"].parent.exists()  # deleted at the end
    heavy = [each for each in launched["page"].fns.values() if each.concurrency_id == "model"]
    assert len(heavy) >= 9
    assert {each.concurrency_limit for each in heavy} == {1}
    assert not [each for each in launched["page"].fns.values() if each.api_visibility != "private"]


def test_a_port_that_is_taken_is_told(model_file, tmp_path, monkeypatch):
    for name in SETTINGS:
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(serving.tempfile, "tempdir", str(tmp_path))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} of 127.0.0.1 cannot be had .*choose another with --port"):
            serve([str(model_file)], device=torch.device("cpu"), limits=Limits(), port=port)
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_told(monkeypatch, sharpprior):
    status, _, error = sharpprior("demo", "/nowhere/at/all")
    assert status == 1
    assert "/nowhere/at/all: no such model" in error
    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"the demo needs gradio: pip install -e '\.\[demo\]'"):
        serve([None], device=torch.device("cpu"), limits=Limits())


@pytest.mark.parametrize(
    ("host", "wanted"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("127.9.9.9", True), ("0.0.0.0", False),
     ("192.168.1.2", False), ("example.org", False)],
)  # fmt: skip
def test_who_reaches_an_address(host, wanted):
    assert is_loopback(host) is wanted
