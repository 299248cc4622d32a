"""What the devices of fake_cuda.cpp notice of the CUDA library's host code, and of torch's own use of them."""

import sys

import pytest
import torch
from every_call import SCHEDULE

import fastgen

fake_cuda = sys.modules.get("fake_cuda")  # a plugin, which has to come before torch
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(fake_cuda is None, reason="needs the fake devices: python tests/device_on_ptx.py --cuda"),
]


def made(device="cuda"):
    return fastgen.q_sample(torch.zeros(3, 40, device=device), 5, SCHEDULE, seed=1)


def test_a_fault_of_a_kernel_reaches_python():
    """And is that call's alone, unlike on a GPU, which is lost."""
    with fake_cuda.memory_out_of_reach():
        x = torch.zeros(3, 40, device="cuda")
    with pytest.raises(RuntimeError, match="CUDA kernel launch failed: no such memory"):
        fastgen.q_sample(x, 5, SCHEDULE, seed=1)
    assert made().isfinite().all()


def test_operators_refuse_tensors_on_several_devices():
    """But take a number on the CPU."""
    x = torch.zeros(3, 40, device="cuda")
    with pytest.raises(RuntimeError, match="the same device"):
        torch.add(x, torch.zeros(3, 40))
    with pytest.raises(RuntimeError, match="the same device"):
        torch.add(x, torch.zeros(3, 40, device="cuda:1"))
    assert torch.equal(x + torch.tensor(1.0), torch.ones(3, 40, device="cuda"))


def test_results_are_on_their_inputs_device():
    assert made("cuda:1").device == torch.device("cuda:1")
    with torch.cuda.device(1):
        assert made().device == torch.device("cuda:1")
        assert made("cuda:0").device == torch.device("cuda:0")
        assert torch.cuda.current_device() == 1
    assert torch.cuda.current_device() == 0


def test_launches_go_to_the_current_stream():
    """The machine refuses others."""
    stream = torch.cuda.Stream()
    assert stream != torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        assert torch.cuda.current_stream() == stream
        made()
    assert torch.cuda.current_stream() != stream


@pytest.mark.parametrize("waits", [torch.Tensor.item, torch.Tensor.cpu, torch.nonzero, lambda x: torch.ones(1).to(x.device)])
def test_what_makes_the_host_wait_is_noticed(waits):
    x = torch.ones(1, device="cuda")
    waits(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        x.add_(1)
        with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
            waits(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_op_without_a_cuda_kernel_is_refused():
    x = torch.zeros(3, 40, device="cuda")
    rows = SCHEDULE.diffusion_loss_table("epsilon", None, x.device, torch.float32).rows
    with pytest.raises(NotImplementedError, match="diffusion_loss_and_gradient"):
        torch.ops.fastgen.diffusion_loss_and_gradient(x, x, rows, None, 3, None, None, 1, 0, None, 0, 0, 1.0, 1)


def test_memory_is_counted():
    before = torch.cuda.memory_allocated()
    x = torch.zeros(100, device="cuda:0")
    assert torch.cuda.memory_allocated() - before == 512
    del x
    assert torch.cuda.memory_allocated() == before
