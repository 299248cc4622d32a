"""torch.nn's binary cross entropy and torchgan's minimax losses, with and without the patch."""

import contextlib
import functools
import io
import logging
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import in_threads
from dispatched import Dispatched

import fastgen
from fastgen.drop_in.losses import patch_bce, patch_torchgan, without_sigmoid

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


def test_it_says_what_it_covers(caplog):
    with caplog.at_level(logging.INFO, DEBUG), patch_bce() as patch:
        assert patch.covered == ("torch.nn.functional.binary_cross_entropy_with_logits",)
        (reason,) = patch.skipped.values()
        assert [*patch.skipped] == ["torch.nn.functional.binary_cross_entropy"] and "without_sigmoid" in reason
        assert caplog.messages == [f"1 of 2 functions of torch.nn run on fastgen; not binary_cross_entropy: {reason}"]


def test_a_function_of_another_library_is_left_alone(monkeypatch):
    torchs = F.binary_cross_entropy_with_logits
    other = functools.wraps(torchs)(lambda *arguments, **keywords: 2 * torchs(*arguments, **keywords))
    monkeypatch.setattr(F, "binary_cross_entropy_with_logits", other)
    with patch_bce() as patch:
        assert F.binary_cross_entropy_with_logits is other and not patch.covered
        assert "another one" in patch.skipped["torch.nn.functional.binary_cross_entropy_with_logits"]


# ---- programs that are made while the patch is in force, or before ---------------------------------------------------------


class Criticised(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.loss = torch.nn.Linear(3, 3), torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0))

    def forward(self, x, y):
        return self.loss(self.layer(x), y)


def criticised(x: torch.Tensor, y: torch.Tensor):
    return F.binary_cross_entropy_with_logits(x, y)


PROGRAMS = {
    "script": lambda module, x, y: torch.jit.script(module),
    "trace": lambda module, x, y: torch.jit.trace(module, (x, y)),
    "symbolic_trace": lambda module, x, y: torch.fx.symbolic_trace(module),
    "compile": lambda module, x, y: torch.compile(module, fullgraph=True, backend="aot_eager"),
    "export": lambda module, x, y: torch.export.export(
        module if isinstance(module, torch.nn.Module) else Called(module), (x.detach(), y)
    ).module(),
}


class Called(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, y):
        return self.function(x, y)


@pytest.fixture
def nothing_scripted_before():
    """TorchScript keeps what it has made of a function or a module's class."""
    torch.jit._state._clear_class_state()
    torch.jit._recursive.concrete_type_store.type_store.clear()
    torch.jit._recursive.concrete_type_store.methods_compiled.clear()
    torch.jit._state._jit_caching_layer.clear()


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("patches", [0, 1, 2])
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("what", ["module", "loss", "function"])
def test_programs(nothing_scripted_before, program, patches, what):
    """Made while that many patches are in force, called in them and after."""
    module = {"module": Criticised(), "loss": torch.nn.BCEWithLogitsLoss(), "function": criticised}[what]
    x, y = logits(4, 3), torch.rand(4, 3)
    expected = module(x, y)
    with contextlib.ExitStack() as stack:
        for _ in range(patches):
            stack.enter_context(patch_bce())
        made = PROGRAMS[program](module, x, y)
        inside = made(x, y)
    for result in (inside, made(x, y)):
        close(result, expected)
        close(torch.autograd.grad(result, x)[0], torch.autograd.grad(expected, x, retain_graph=True)[0])
    if program == "export":
        assert not any("fastgen" in str(node.target) for node in made.graph.nodes)


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda f: torch.jit.trace(f, (torch.ones(3), torch.ones(3)))])
def test_programs_made_before_and_those_that_are_saved(nothing_scripted_before, make):
    x, y, file = logits(4, 3), torch.rand(4, 3), io.BytesIO()
    before, expected = make(criticised), criticised(x, y)
    with patch_bce():
        close(before(x, y), expected)
        torch.jit.save(make(criticised), file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(x, y), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
def test_the_function_itself_is_scripted(nothing_scripted_before):
    x, y = logits(4, 3), torch.rand(4, 3)
    with patch_bce(), patch_bce():
        scripted = torch.jit.script(F.binary_cross_entropy_with_logits)
    assert torch.equal(scripted(x, y), F.binary_cross_entropy_with_logits(x, y))


class Watched(torch.Tensor):
    handled = {F.binary_cross_entropy_with_logits: "of the table"}

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), keywords=None):
        return cls.handled.get(function, NotImplemented)


def test_what_a_tensor_class_has_in_its_table_is_found():
    with patch_bce():
        assert F.binary_cross_entropy_with_logits(torch.zeros(3).as_subclass(Watched), torch.ones(3)) == "of the table"


def test_a_default_device_leaves_the_loss_covered():
    x, y = logits(3), torch.ones(3)
    with patch_bce(), torch.device("cpu"), Dispatched() as ops:
        F.binary_cross_entropy_with_logits(x, y, reduction="sum")
    assert ops.of_fastgen() == 1


# ---- a Sigmoid and BCELoss ------------------------------------------------------------------------------------------------


def discriminator(*last):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.LeakyReLU(0.2), torch.nn.Linear(8, 1), *(last or [torch.nn.Sigmoid()])
    )


def trained(D, criterion, dtype=torch.float32):
    """A GAN script as there are many: what each step's losses were, and the weights in the end."""
    D.to(dtype)
    torch.manual_seed(1)
    G = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)).to(dtype)
    step_d, step_g = (torch.optim.SGD(network.parameters(), lr=0.1) for network in (D, G))
    losses = []
    for _ in range(5):
        real, z = torch.randn(16, 4, dtype=dtype), torch.randn(16, 2, dtype=dtype)
        real_label, fake_label = torch.ones(16, 1, dtype=dtype), torch.zeros(16, 1, dtype=dtype)
        step_d.zero_grad()
        loss_d = criterion(D(real), real_label) + criterion(D(G(z).detach()), fake_label)
        loss_d.backward()
        step_d.step()
        step_g.zero_grad()
        loss_g = criterion(D(G(z)), real_label)
        loss_g.backward()
        step_g.step()
        losses += [loss_d.detach(), loss_g.detach()]
    return torch.stack(losses), *(p.detach() for network in (D, G) for p in network.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_script_with_a_sigmoid_trains_the_same_without_it(dtype, reduction):
    expected = trained(discriminator(), torch.nn.BCELoss(reduction=reduction), dtype)
    with Dispatched() as ops:
        results = trained(*without_sigmoid(discriminator(), torch.nn.BCELoss(reduction=reduction)), dtype)
    for ours, theirs in zip(results, expected, strict=True):
        close(ours, theirs)
    assert ops.of_fastgen() == 30 and ops["aten.sigmoid"] == ops["aten.binary_cross_entropy"] == 0


def test_the_network_has_the_same_layers_and_names():
    D = discriminator(torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Sigmoid())).eval()
    D[0].train()
    kept, weight = [*D], torch.tensor([1.0, 2.0])
    made, criterion = without_sigmoid(D, torch.nn.BCELoss(weight, reduction="none").eval())
    x = torch.randn(3, 4)
    close(made(x).sigmoid(), D(x))
    assert [*D] == kept and [*made][:3] == kept[:3] and made[3][0] is D[3][0] and len(made[3]) == 1
    assert [(n, p) for n, p in made.named_parameters()] == [(n, p) for n, p in D.named_parameters()]
    assert [*made.state_dict()] == [*D.state_dict()]
    assert not made.training and not made[3].training and made[0].training and not criterion.training
    assert type(criterion) is fastgen.BCEWithLogitsLoss and criterion.weight is weight and criterion.reduction == "none"
    y = torch.rand(3, 2)
    probabilities = torch.rand(3, 2)
    close(criterion(probabilities.logit(), y), torch.nn.BCELoss(weight, reduction="none")(probabilities, y))


@pytest.mark.parametrize("x, y, loss, gradient, theirs", [
    (12.0, 0.0, 12.0, 1.0, (11.991, 1.0)),
    (16.7, 0.0, 16.7, 1.0, (100.0, 0.0)),
    (-30.0, 1.0, 30.0, -1.0, (30.0, -0.0936)),
    (-90.0, 1.0, 90.0, -1.0, (100.0, 0.0)),
])  # fmt: skip
def test_the_tails(x, y, loss, gradient, theirs):
    """Where BCELoss loses the digits, clamps, or has no gradient, as `without_sigmoid` says."""
    networks = torch.nn.Sequential(torch.nn.Sigmoid()), torch.nn.BCELoss()
    for (network, criterion), expected in ((networks, theirs), (without_sigmoid(*networks), (loss, gradient))):
        logit = torch.tensor([x], requires_grad=True)
        value = criterion(network(logit), torch.tensor([y]))
        value.backward()
        assert value.item() == pytest.approx(expected[0], abs=5e-4) and logit.grad.item() == pytest.approx(expected[1], abs=5e-5)


class Reshaped(torch.nn.Sequential):
    pass


def hooked():
    D = discriminator()
    D[-1].register_forward_hook(lambda *_: None)
    return D


@pytest.mark.parametrize(
    "network, criterion, error, words",
    [
        (discriminator(), torch.nn.BCEWithLogitsLoss(), TypeError, "criterion: expected a torch.nn.BCELoss, got BCEWithLogitsLoss"),
        (discriminator(), "BCELoss", TypeError, "criterion: .* got str"),
        (discriminator(torch.nn.Tanh()), torch.nn.BCELoss(), ValueError, "network: .*Sigmoid as its last layer, got Tanh"),
        (torch.nn.Sequential(), torch.nn.BCELoss(), ValueError, "network: .*Sigmoid as its last layer, got None"),
        (discriminator(discriminator(torch.nn.ReLU())), torch.nn.BCELoss(), ValueError, "got ReLU"),
        (Reshaped(torch.nn.Sigmoid()), torch.nn.BCELoss(), TypeError, "network: expected a torch.nn.Sequential.* got Reshaped"),
        (Criticised(), torch.nn.BCELoss(), TypeError, "network: .* got Criticised"),
        (hooked(), torch.nn.BCELoss(), ValueError, "network: expected none of the hooks .* Sigmoid"),
    ],
)  # fmt: skip
def test_what_has_no_sigmoid_to_take_off_is_refused(network, criterion, error, words):
    with pytest.raises(error, match=words):
        without_sigmoid(network, criterion)


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


def test_torchgans_functions_of_another_version_are_left_alone(torchgan, monkeypatch, caplog):
    """Which keep their own code, and what another library has put in their place too."""
    from torchgan.losses import functional, minimax

    written = functional.minimax_generator_loss
    with patch_torchgan() as patch:
        assert len(patch.covered) == 6 and not patch.skipped
        with patch_torchgan() as nested:  # of what is patched, it knows what was there
            assert nested.covered == patch.covered
    monkeypatch.setattr(minimax, "minimax_generator_loss", functools.wraps(written)(lambda dgz, *rest: 2 * written(dgz, *rest)))
    monkeypatch.setattr(written, "__defaults__", (False, "mean"))
    x, y = logits(4, 1), logits(4, 1, seed=1)
    expected = torchgan.MinimaxGeneratorLoss()(x), written(x)
    with patch_torchgan() as patch, caplog.at_level(logging.INFO, DEBUG), Dispatched() as ops:
        names = ["torchgan.losses.functional", "torchgan.losses.minimax", "torchgan.losses"]
        assert [*patch.skipped] == [f"{name}.minimax_generator_loss" for name in names]
        assert all(
            "torchgan 0.1.0" in reason for reason in patch.skipped.values()
        ) and "3 of 6 names of torchgan's functions" in repr(patch)
        assert torch.equal(torchgan.MinimaxGeneratorLoss()(x), expected[0]) and torch.equal(
            functional.minimax_generator_loss(x), expected[1]
        )
        assert ops.of_fastgen() == 0
        torchgan.MinimaxDiscriminatorLoss()(x, y)
        assert ops.of_fastgen() == 1


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("program", ["trace", "export", "compile"])
def test_torchgans_programs(torchgan, program):
    from torchgan.losses import functional

    def loss(x, y):
        return functional.minimax_discriminator_loss(x, y) + functional.minimax_generator_loss(y)

    x, y = logits(4, 1), logits(4, 1, seed=1)
    expected = loss(x, y)
    with patch_torchgan():
        made = PROGRAMS[program](loss, x, y.detach())
        close(made(x, y), expected)
    close(torch.autograd.grad(made(x, y), x)[0], torch.autograd.grad(expected, x)[0])


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


def test_a_layer_that_comes_twice_stays_twice():
    act, last = torch.nn.LeakyReLU(0.2), torch.nn.Sigmoid()
    for layers in (
        [torch.nn.Linear(3, 3), act, torch.nn.Linear(3, 2), act, last],
        [torch.nn.Linear(3, 2), last, torch.nn.Tanh(), last],
    ):
        network, x = torch.nn.Sequential(*layers), torch.randn(5, 3)
        made, _ = without_sigmoid(network, torch.nn.BCELoss())
        assert len(made) == len(network) - 1
        close(made(x).sigmoid().detach(), network(x).detach())


def test_what_without_sigmoid_would_lose_is_refused():
    criterion = torch.nn.BCELoss()
    criterion.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="^criterion: expected none of the hooks"):
        without_sigmoid(torch.nn.Sequential(torch.nn.Sigmoid()), criterion)
    network = torch.nn.Sequential(torch.nn.Sigmoid())
    network.register_buffer("scale", torch.ones(1))
    with pytest.raises(ValueError, match="^network: expected no parameters of its own, .* got \\['scale'\\]"):
        without_sigmoid(network, torch.nn.BCELoss())


def test_a_wrapper_around_the_patched_function_is_not_replaced():
    with patch_bce():
        ours = F.binary_cross_entropy_with_logits
        F.binary_cross_entropy_with_logits = functools.wraps(ours)(lambda *a, **k: 2 * ours(*a, **k))
        try:
            with patch_bce() as second:
                assert second.covered == () and F.binary_cross_entropy_with_logits(torch.zeros(2), torch.ones(2)) > 1
        finally:
            F.binary_cross_entropy_with_logits = ours
