"""torch.nn's binary cross entropy and torchgan's minimax losses, with and without the patch."""

import logging
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import in_threads
from dispatched import Dispatched

from fastgen.drop_in.losses import patch_bce, patch_torchgan

DEBUG = "fastgen.drop_in"


def logits(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def close(ours, theirs):
    """Equal to a few roundings, in value, shape and dtype."""
    loose = {torch.float16: 5e-3, torch.bfloat16: 2e-2}.get(theirs.dtype, 2e-6)
    torch.testing.assert_close(ours, theirs, rtol=loose, atol=loose)


def with_and_without(patch, loss, *inputs):
    """The loss and the gradients to the inputs, twice."""
    results = []
    for patched in (True, False):
        undo = patch() if patched else None
        value = loss(*inputs)
        if undo:
            undo.unpatch()
        results.append((value, *torch.autograd.grad(value.sum(), [x for x in inputs if x.requires_grad])))
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs)


# ---- torch.nn -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_module_is_torchs(dtype, reduction, weighted):
    weights = (torch.tensor([1.0, 2.0, 0.5], dtype=dtype), torch.tensor(3.0, dtype=dtype)) if weighted else (None, None)
    module = torch.nn.BCEWithLogitsLoss(weights[0], reduction=reduction, pos_weight=weights[1])
    with_and_without(patch_bce, module, logits(5, 3, dtype=dtype), logits(5, 3, seed=1).detach().sigmoid().to(dtype))


def test_the_patch_reaches_the_kernels_and_goes_away():
    x, y = logits(4, 3), torch.rand(4, 3)
    module = torch.nn.BCEWithLogitsLoss()
    torchs = F.binary_cross_entropy_with_logits
    with patch_bce(), Dispatched() as ops:
        module(x, y).backward()
    assert ops.of_fastgen() == 2 and ops["aten.binary_cross_entropy_with_logits"] == 0
    with Dispatched() as ops:
        module(x, y)
    assert ops.of_fastgen() == 0 and F.binary_cross_entropy_with_logits is torchs


def test_patches_nest():
    torchs = F.binary_cross_entropy_with_logits
    first, second = patch_bce(), patch_bce()
    first.unpatch()
    with Dispatched() as ops:
        F.binary_cross_entropy_with_logits(logits(3), torch.ones(3))
    assert ops.of_fastgen() == 1
    second.unpatch()
    assert F.binary_cross_entropy_with_logits is torchs


def test_a_training_run_is_the_same():
    def train():
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
        for _ in range(10):
            x = torch.randn(16, 4)
            optimizer.zero_grad()
            loss = torch.nn.BCEWithLogitsLoss()(network(x), (x[:, :1] > 0).float())
            loss.backward()
            optimizer.step()
        return loss

    expected = train()
    with patch_bce():
        close(train(), expected)


def test_autocast_gives_torchs_dtype():
    x, y = logits(4, dtype=torch.bfloat16), torch.ones(4, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = F.binary_cross_entropy_with_logits(x, y)
        with patch_bce():
            close(F.binary_cross_entropy_with_logits(x, y), expected)


class Marked(torch.Tensor):
    pass


@pytest.mark.filterwarnings("ignore:size_average")
@pytest.mark.parametrize(
    "arguments", [{"size_average": False}, {"reduce": False}, {"input": torch.zeros(3).as_subclass(Marked)}], ids=str
)
def test_the_rest_runs_torchs_function_and_says_so(caplog, arguments):
    arguments = {"input": torch.zeros(3), "target": torch.ones(3)} | arguments
    expected = F.binary_cross_entropy_with_logits(**arguments)
    with patch_bce(), caplog.at_level(logging.DEBUG, DEBUG):
        result = F.binary_cross_entropy_with_logits(**arguments)
    assert torch.equal(result, expected) and type(result) is type(expected)
    assert "not fastgen but the original" in caplog.text


@pytest.mark.parametrize(
    "arguments",
    [
        {"target": torch.ones(2)},
        {"target": torch.ones(3, dtype=torch.int64)},
        {"target": 1.0},
        {"reduction": "median"},
        {"weight": torch.ones(4)},
    ],
    ids=str,
)
def test_errors_are_torchs(arguments):
    arguments = {"input": torch.zeros(3), "target": torch.ones(3)} | arguments
    with pytest.raises(Exception) as theirs:  # noqa: B017
        F.binary_cross_entropy_with_logits(**arguments)
    with patch_bce(), pytest.raises(type(theirs.value)) as ours:
        F.binary_cross_entropy_with_logits(**arguments)
    assert str(ours.value) == str(theirs.value)


def test_it_compiles_whole():
    with patch_bce():
        compiled = torch.compile(lambda x, y: F.binary_cross_entropy_with_logits(2 * x, y), backend="aot_eager", fullgraph=True)
        x, y = logits(4), torch.ones(4)
        close(compiled(x, y), F.binary_cross_entropy_with_logits(2 * x, y))


def test_threads_may_patch_and_unpatch():
    torchs, x, y = F.binary_cross_entropy_with_logits, torch.zeros(3), torch.ones(3)

    def work(_):
        for _ in range(50):
            with patch_bce():
                assert abs(F.binary_cross_entropy_with_logits(x, y).item() - 0.6931472) < 1e-6

    in_threads(4, work)
    assert F.binary_cross_entropy_with_logits is torchs


# ---- torchgan -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torchgan():
    if find_spec("torchvision") is None:
        sys.path.append(str(Path(__file__).parent / "stand_in"))
    return pytest.importorskip("torchgan.losses")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0, -0.2])
def test_torchgans_discriminator_loss(torchgan, dtype, reduction, smoothing):
    module = torchgan.MinimaxDiscriminatorLoss(smoothing, reduction)
    with_and_without(patch_torchgan, module, logits(5, 2, dtype=dtype), logits(5, 2, dtype=dtype, seed=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("nonsaturating", [True, False])
def test_torchgans_generator_loss(torchgan, dtype, reduction, nonsaturating):
    with_and_without(patch_torchgan, torchgan.MinimaxGeneratorLoss(reduction, nonsaturating), logits(5, 2, dtype=dtype))


def test_torchgans_mixed_dtypes(torchgan):
    loss = torchgan.MinimaxDiscriminatorLoss()
    with_and_without(patch_torchgan, loss, logits(5), logits(5, dtype=torch.float64, seed=1))


def test_torchgans_errors_where_shapes_differ(torchgan):
    with patch_torchgan(), pytest.raises(ValueError, match="Target size"):
        torchgan.MinimaxDiscriminatorLoss()(logits(4, 1), logits(3, 1))
    with patch_torchgan(), pytest.raises(ValueError, match="median"):
        torchgan.MinimaxGeneratorLoss("median")(logits(4, 1))


def test_torchgans_names_are_all_reached_and_put_back(torchgan):
    from torchgan.losses import functional, minimax

    names = [(m, n) for m in (functional, minimax, torchgan) for n in ("minimax_generator_loss", "minimax_discriminator_loss")]
    before, x = [getattr(module, name) for module, name in names], logits(4)
    with patch_torchgan():
        for module, name in names:
            with Dispatched() as ops:
                getattr(module, name)(*[x] * (1 + ("disc" in name)))
            assert ops.of_fastgen() == 1 and sum(ops.counts.values()) == 1
    assert before == [getattr(module, name) for module, name in names]


def test_torchgans_training_steps(torchgan):
    """Both `train_ops`, as torchgan's trainer calls them."""
    from torchgan.models import DCGANDiscriminator, DCGANGenerator

    def train():
        torch.manual_seed(0)
        generator = DCGANGenerator(encoding_dims=4, out_size=16, out_channels=1, step_channels=4)
        discriminator = DCGANDiscriminator(in_size=16, in_channels=1, step_channels=4)
        losses = []
        for _ in range(2):
            step = torch.optim.SGD(discriminator.parameters(), lr=0.01)
            real = torch.randn(4, 1, 16, 16)
            losses.append(torchgan.MinimaxDiscriminatorLoss().train_ops(generator, discriminator, step, real, torch.device("cpu")))
            step = torch.optim.SGD(generator.parameters(), lr=0.01)
            losses.append(torchgan.MinimaxGeneratorLoss().train_ops(generator, discriminator, step, torch.device("cpu"), 4))
        return torch.tensor(losses)

    expected = train()
    with patch_torchgan(), Dispatched() as ops:
        close(train(), expected)
    assert ops.of_fastgen() == 8  # forward and backward of four steps
