"""What the Triton backend's direct launches hand to Triton's launcher, beside what Triton's own dispatch hands to it: on tensors of
the CPU, with a driver for sm_90 that writes down each launch and runs nothing, and a compiler that compiles nothing. Prints one
line of JSON. For a process of its own, in which Triton is no interpreter."""

import contextlib
import inspect
import json
import logging
import types
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
from conftest import sliced, unaligned
from test_dispatch import op_samples
from torch.utils import _pytree as pytree
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

import fastgen.triton
from fastgen._core import dispatch
from fastgen.triton.common import direct

launched, logged = [], []
alive = []  # what has been launched on: no other tensor may get its memory before the call ends


class Launcher:
    """As those of Triton's drivers are called, from 3.7 on."""

    def __init__(self, source, metadata):
        self.name, self.signature = metadata.name, list(source.signature.values())

    def __call__(
        self,
        gridX,
        gridY,
        gridZ,
        stream,
        function,
        kernel_metadata,
        launch_metadata,
        launch_enter_hook,
        launch_exit_hook,
        *args,
    ):
        alive.append(args)
        values = [x for x, kind in zip(args, self.signature, strict=True) if kind != "constexpr"]
        addresses = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in values]
        pointers = [kind[0] == "*" for kind in self.signature if kind != "constexpr"]
        launched.append(((self.name, function, gridX, gridY, gridZ, stream, kernel_metadata), addresses, pointers))
        for hook in (launch_enter_hook, launch_exit_hook):
            if hook is not None:
                hook(launch_metadata)


class OtherLauncher(Launcher):
    """One of a Triton that is not known."""

    def __call__(self, grid, *args):
        pass


class UnreadableLauncher(Launcher):
    """One that does not say what it takes."""

    def __call__(self, *args):
        pass

    __call__.__signature__ = 0  # inspect.signature raises a TypeError


class Uncompiled(CompiledKernel):
    """One for each set of arguments for which Triton would compile."""

    def __init__(self, source, target, options):
        self.src, self.name, self.hash, self.kernel, self.metadata_group = source, source.name, "", b"", {}
        values = {"name": source.name, "shared": 0, "num_warps": options["num_warps"], "target": target, "warp_size": 32}
        self.metadata, self.packed_metadata = types.SimpleNamespace(**values), (options["num_warps"], 1, 0)
        self.module = self.function = self._run = self._module_pid = None


def stand_in(launcher=Launcher):
    functions = iter(range(1, 1 << 20))
    utils = types.SimpleNamespace(
        load_binary=lambda *arguments: (1, next(functions), 0, 0, 1024),
        unload_module=lambda module: None,
        get_device_properties=lambda device: {"max_shared_mem": 232448},
    )
    return types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 7,
        launcher_cls=launcher,
        utils=utils,
    )


def seen(function, arguments, keywords):
    """The launches of a call, and its results, with the tensors that it was given and those that it made by their order."""
    launched.clear()
    alive.clear()
    results = function(*arguments, **keywords)
    given = [x for x in pytree.tree_leaves((arguments, keywords)) if isinstance(x, torch.Tensor)]
    names = {}
    for k, x in enumerate(given):
        names.setdefault(x.data_ptr(), f"given {k}")

    def name(address):
        return names.setdefault(address, f"made {len(names)}")

    launches = []
    for what, values, pointers in launched:
        launches.append((what, [name(x) if is_pointer else x for x, is_pointer in zip(values, pointers, strict=True)]))
    made = [(name(x.data_ptr()), x.shape, x.stride(), x.dtype) for x in pytree.tree_leaves(results) if x is not None]
    return launches, type(results).__name__, made


def copies(tree):
    """In memory of their own; with the same layout, and as far from an aligned address."""

    def copy(x):
        base = torch.empty(x.untyped_storage().nbytes() // x.itemsize + 8, dtype=x.dtype)
        return base.as_strided(x.shape, x.stride(), x.storage_offset())

    return pytree.tree_map_only(torch.Tensor, copy, tree)


def other_numbers(function, arguments):
    """The same arguments with other numbers where kernels take them as numbers."""
    names = list(inspect.signature(function).parameters)
    other = {"index": lambda x: x + 1, "seed": lambda x: x + 2**40, "offset": lambda x: x + 2**33}
    change = {name: other.get(name, lambda x: 1.25 * x) for name in direct.NUMBERS}
    return tuple(
        change[name](x) if name in change and x is not None else x
        for name, x in zip(names[: len(arguments)], arguments, strict=True)
    )


def samples():
    """Those of every op, and some more layouts and addresses."""
    for op, arguments, keywords in op_samples():
        if op in fastgen.triton.FUNCTIONS:
            yield op, arguments, keywords
            for change in (unaligned, sliced):
                if isinstance(arguments[0], torch.Tensor) and arguments[0].dim():
                    yield op, (change(arguments[0]), *arguments[1:]), keywords
    big = torch.empty(3, 3, 512, 512)  # more programs than one
    rows = torch.empty(10, 3)
    yield "bce_with_logits", (big, big, None, None, 1), {}
    yield "gan_loss", ([big, big[0]], 1, 0, 0.0, 1, True, True), {}
    for reduction in range(3):
        yield "diffusion_loss", (big, big, rows, None, 3, None, None, 5, 0, None, 0, 0, 1.0, reduction), {}


def compared():
    """Every sample: (op, whether it was launched directly the second and the third time, what differs from Triton's dispatch)."""
    found = []
    for op, arguments, keywords in samples():
        function, call = fastgen.triton.FUNCTIONS[op][0], fastgen.triton.op(op)
        with contextlib.suppress(RuntimeError, IndexError):  # a layout or type that the op refuses, either way
            function(*copies(arguments), **copies(keywords))
            differs = []
            for numbers in (arguments, other_numbers(function, arguments), arguments):
                expected = seen(function, copies(numbers), copies(keywords))
                actual = seen(call, copies(numbers), copies(keywords))
                if actual != expected:
                    differs.append(f"{actual} in place of {expected}")
            found.append((op, direct_calls(call, copies(arguments), copies(keywords)), differs))
    return found


def direct_calls(call, arguments, keywords, otherwise=None):
    """Whether a call leaves the function of its op alone, in whose place there may be another."""
    function, called = call.function, []
    call.function = lambda *rest, **more: called.append(1) or (otherwise or function)(*rest, **more)
    try:
        call(*arguments, **keywords)
    finally:
        call.function = function
    return not called


X, ROWS = torch.empty(4, 6), torch.empty(10, 2)
Q_SAMPLE = (X, ROWS, None, 3, None, None, 5, 0)


def is_direct(otherwise=None):
    return direct_calls(fastgen.triton._CALLED["q_sample"], copies(Q_SAMPLE), {}, otherwise)


def observers():
    """Whether the call of an op is direct before, while and after something sees to launches; how often a hook was called."""
    calls, kernel = [], fastgen.triton.q_sample.q_sample_kernel
    hook = lambda *arguments, **keywords: calls.append(1)  # noqa: E731
    found = {"nobody": [is_direct(), is_direct()]}
    for name in ("launch_enter_hook", "launch_exit_hook"):
        chain = getattr(knobs.runtime, name)
        chain.add(hook)
        found[name] = [is_direct(), len(calls)]
        chain.remove(hook)
        calls.clear()
    knobs.runtime.launch_enter_hook, chain = hook, knobs.runtime.launch_enter_hook
    found["a single hook"] = [is_direct(), len(calls)]
    knobs.runtime.launch_enter_hook = None
    found["no hook"] = [is_direct(), 0]
    knobs.runtime.launch_enter_hook = chain
    calls.clear()
    kernel.add_pre_run_hook(hook)
    found["pre-run hook"] = [is_direct(), len(calls)]
    kernel.pre_run_hooks.remove(hook)
    knobs.runtime.debug = True
    found["debug"] = [is_direct()]
    knobs.runtime.debug = False
    knobs.compilation.instrumentation_mode = "consan"
    found["instrumentation"] = [is_direct(lambda *arguments: None)]
    knobs.compilation.instrumentation_mode = ""
    dispatch.dispatch_modes, modes = lambda: 1, dispatch.dispatch_modes
    found["dispatch mode"] = [is_direct(lambda *arguments: None)]
    dispatch.dispatch_modes = modes
    found["nobody again"] = [is_direct()]
    return found


def aliases():
    """A call in place first, then one to other memory: what it writes to is what it is given."""
    call, x, out = fastgen.triton.op("q_step_out"), torch.empty(5, 7), torch.empty(5, 7)
    call(x, ROWS, None, 3, None, None, 5, 0, out=x)
    (_, values, _), *_ = launched[-1:]
    in_place = values[:2] == [x.data_ptr(), x.data_ptr()]
    call(x, ROWS, None, 3, None, None, 5, 0, out=out)
    return [in_place, launched[-1][1][:2] == [out.data_ptr(), x.data_ptr()]]


def cleared():
    """The kernels that Triton has compiled are let go, and garbage is collected: what is kept still launches what it launched."""
    is_direct()
    before = launched[-1][0]
    fastgen.triton.q_sample.q_sample_kernel.device_caches.clear()
    return [is_direct(), launched[-1][0] == before]


def other_device():
    """Another device is the current one: it is set for the launch."""
    entered = []

    @contextlib.contextmanager
    def guard(index):
        entered.append(index)
        yield

    is_direct()
    active, original = driver.active, torch.accelerator.device_index
    active.get_current_device, torch.accelerator.device_index = lambda: 1, guard
    found = is_direct()
    active.get_current_device, torch.accelerator.device_index = lambda: 0, original
    return [found, entered]


def threads():
    """Two at a time, from the first call of its shape on: the launches are those of one."""
    shapes = [(k, 3) for k in range(1, 40)] * 2

    def run(shape):
        x = torch.empty(shape)
        y = fastgen.triton.op("q_sample")(x, ROWS, None, 3, None, None, 5, 0)
        return (x.data_ptr(), y.data_ptr()), (x, y)

    launched.clear()
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(run, shapes))
    expected = sorted((y, x) for (x, y), _ in made)
    return expected == sorted(tuple(values[:2]) for _, values, _ in launched)


def other_drivers():
    """A driver that is another, then some whose launchers take other arguments or do not say which, then one of another vendor.
    Of calls: whether the first and the second are direct."""
    found = {}
    is_direct()
    driver.set_active(stand_in())
    found["another"] = is_direct()
    for launcher in (OtherLauncher, UnreadableLauncher):
        forgotten()
        fastgen.triton.q_sample.q_sample_kernel.device_caches.clear()
        driver.set_active(stand_in(launcher))
        found[launcher.__name__] = [is_direct(), is_direct()], direct._problem(launcher)
    amd = stand_in()
    amd.get_current_target = lambda: GPUTarget("hip", "gfx942", 64)
    driver.set_active(amd)
    found["amd"] = direct._found(Launcher)
    return found


def forgotten():
    """Nothing is kept of the op that `is_direct` calls."""
    fastgen.triton.op("q_sample").kinds.clear()


def missing():
    """A name that a Triton does not have: whether the first and the second call are direct, then those when it is back."""
    found, kernel = {}, fastgen.triton.q_sample.q_sample_kernel
    forgotten()
    value = kernel.__dict__.pop("do_not_specialize")
    found["do_not_specialize"] = [is_direct(), is_direct()]
    kernel.do_not_specialize = value
    forgotten()
    kernel.signature, value = object(), kernel.signature
    found["signature.parameters"] = [is_direct(), is_direct()]
    kernel.signature = value
    forgotten()
    direct.knobs, known = types.SimpleNamespace(runtime=object()), knobs
    found["knobs"] = [is_direct(), is_direct()]
    direct.knobs = known
    forgotten()
    found["all there"] = [is_direct(), is_direct()]
    return found


if __name__ == "__main__":
    triton.compiler.compile = Uncompiled
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    direct._log.addHandler(handler)
    direct._log.setLevel(logging.INFO)
    driver.set_active(stand_in())
    found = {"triton": triton.__version__, "samples": compared(), "observers": observers(), "aliases": aliases()}
    found |= {"cleared": cleared(), "other device": other_device(), "threads": threads(), "missing": missing()}
    found |= {"other drivers": other_drivers()}
    print(json.dumps({**found, "logged": logged}))
