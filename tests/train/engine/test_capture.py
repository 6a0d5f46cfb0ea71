"""The CUDA recorder, with stand-ins for torch's CUDA: what it asks of them, in which order. No GPU has run it here."""

import contextlib
import inspect
from unittest import mock

import pytest
import torch

from train.engine.capture import RECORDERS, CudaRecorder

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def cuda(monkeypatch) -> mock.Mock:
    """torch.cuda's names that the recorder uses, all calls in one list."""
    calls = mock.MagicMock()
    for name in ("Stream", "stream", "CUDAGraph", "graph", "synchronize", "current_stream", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(calls, name))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", calls.graph_pool_handle)
    calls.graph.return_value.__exit__.return_value = False
    return calls


def names(cuda: mock.Mock) -> list[str]:
    return [name for name, _, _ in cuda.mock_calls if not name.startswith(("Stream", "graph_pool_handle"))]


def test_the_torch_at_hand_knows_what_is_asked_of_it():
    known = inspect.signature(torch.cuda.graph.__init__).parameters
    assert {"pool", "stream", "capture_error_mode"} <= set(known)
    assert {"cuda": CudaRecorder} == RECORDERS


def test_warm_up_is_on_the_capture_s_stream_between_two_waits(cuda):
    recorder = CudaRecorder(DEVICE)
    with recorder.side():
        cuda.work()
    assert names(cuda) == ["synchronize", "stream", "stream().__enter__", "work", "stream().__exit__", "synchronize"]
    cuda.stream.assert_called_once_with(cuda.Stream.return_value)


def test_captures_share_one_pool_and_stream_and_judge_errors_by_thread(cuda):
    recorder = CudaRecorder(DEVICE)
    tensors = [torch.ones(1), None]
    one, two = recorder.capture(lambda: tensors), recorder.capture(lambda: [])
    assert one.tensors is tensors
    assert two.tensors == []
    pool, stream = cuda.graph_pool_handle.return_value, cuda.Stream.return_value
    expected = mock.call(cuda.CUDAGraph.return_value, pool=pool, stream=stream, capture_error_mode="thread_local")
    assert cuda.graph.call_args_list == [expected, expected]
    one.replay()
    cuda.CUDAGraph.return_value.replay.assert_called_once_with()


def test_a_capture_that_fails_leaves_the_stream_that_was_current(cuda):
    def function():
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        CudaRecorder(DEVICE).capture(function)
    cuda.set_stream.assert_called_once_with(cuda.current_stream.return_value)


def test_a_capture_whose_end_fails_does_too(cuda):
    cuda.graph.return_value.__exit__.side_effect = RuntimeError("invalid capture")
    with contextlib.suppress(RuntimeError):
        CudaRecorder(DEVICE).capture(lambda: [])
    cuda.set_stream.assert_called_once_with(cuda.current_stream.return_value)
