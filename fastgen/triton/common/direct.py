"""Direct launches: what a call of an op launched, kept by all that this depends on, and launched again with other addresses.

What an op allocates and launches follows from the shapes, strides, dtypes and options that it is given; only addresses and the
numbers of `NUMBERS` differ between two calls that agree in those. So the first such call runs the op, which says what it allocates
(`made`) and launches (`launched`), and later ones repeat that: no layout is looked at again, and Triton does not look at every
argument to find the compiled kernel that it found the last time, which is most of a call's time on the host.

Of Triton, this is the one place that uses names that are not documented; `_repeatable` checks that they mean what they are taken to
mean. Where they do not, or something wants to see each launch, ops and kernels are called in the ordinary way.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from typing import Any, NamedTuple

import torch
import triton.language as tl
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from ..._core import dispatch

# Arguments of ops that kernels take by the same names, and by which Triton does not choose a kernel: their annotations say so.
NUMBERS = ("index", "seed", "offset", "clip", "guidance", "delta")
# The arguments of a launcher, of which 3.6 names the first five.
_LAUNCHER = (
    *("gridX", "gridY", "gridZ", "stream", "function"),
    *("kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook"),
)
# What is read of a kernel and of what Triton has compiled it to.
_KERNEL = ("arg_names", "signature", "do_not_specialize", "pre_run_hooks")
_COMPILED = ("run", "function", "packed_metadata")
# What a Triton raises in which a name is missing or means something else: then its own dispatch is left to it.
_UNKNOWN = (AttributeError, TypeError, ValueError, KeyError)
MOST = 4096  # calls that are kept of an op: for each shape that it meets, one
_PLAIN, _OPTIONS = (torch.Tensor, torch.nn.Parameter), (type(None), bool, int, float)
_log = logging.getLogger(__name__)


class _Launch(NamedTuple):
    """A launch as an op has made it: the arguments are tensors, numbers and constants."""

    kernel: Any  # triton.JITFunction
    compiled: Any  # triton.compiler.CompiledKernel
    programs: int
    arguments: tuple
    parameters: dict[str, Any]


class _Recorder(threading.local):
    """What the op that runs in this thread has made and launched; None where nobody wants to know."""

    tensors: list[torch.Tensor] | None = None
    launches: list[_Launch] | None = None
    device: int = -1  # Triton's number of the one on which it launched


_recorder = _Recorder()


def made(tensor):
    """`tensor`, which the op has just allocated, and nothing is in it yet."""
    if _recorder.tensors is not None:
        _recorder.tensors.append(tensor)
    return tensor


def launched(kernel, compiled, programs, arguments, parameters):
    """To be called after each launch, on its device."""
    if _recorder.launches is not None:
        _recorder.device = driver.active.get_current_device()
        _recorder.launches.append(_Launch(kernel, compiled, programs, arguments, parameters))


class _Kept(NamedTuple):
    """A launch to be repeated: which of its arguments are addresses and numbers, and of which tensors and arguments of the op."""

    compiled: Any  # which would unload its code, were it let go
    run: Any
    function: int
    metadata: Any
    programs: int
    arguments: list
    addresses: list[tuple[int, int]]
    numbers: list[tuple[int, int]]


class _Call(NamedTuple):
    """A call to be repeated. `result` has the places of its tensors among those of the op, its own after those that it is given."""

    driver: Any
    device: int
    hooks: list[list]  # those of each kernel that Triton would run before it
    allocations: list[tuple]
    launches: list[_Kept]
    result: Any


class Direct:
    """An op by its function, `function`, whose calls are kept."""

    def __init__(self, function):
        self.function = function
        functools.update_wrapper(self, function)
        parameters = inspect.signature(function).parameters
        self.names = list(parameters)
        self.defaults = [parameter.default for parameter in parameters.values()]
        self.list_at = self.names.index("logits") if "logits" in self.names else None  # the one argument that is several tensors
        # by the types of the arguments: how to read them, and the calls that are kept; None for types of which nothing is known
        self.kinds: dict[tuple[type, ...], tuple[Any, dict[tuple, _Call | None]] | None] = {}

    def __call__(self, *arguments, **keywords):
        if keywords:
            given, arguments = arguments, list(self.defaults)
            arguments[: len(given)] = given
            for name, value in keywords.items():
                arguments[self.names.index(name)] = value
        at = self.list_at
        flat = arguments if at is None else [*arguments[:at], *arguments[at], *arguments[at + 1 :]]
        types = tuple(map(type, flat))
        try:
            kind = self.kinds[types]
        except KeyError:
            kind = self.kinds[types] = self.kind(types)
        if kind is None:
            return self.function(*arguments)
        read, kept = kind
        key, tensors, addresses, together = read(*flat)
        if together & 15:
            # Triton makes another kernel where it knows that an address is a multiple of 16; rarely one is not
            key += tuple([address % 16 == 0 for address in addresses])
        try:
            call = kept[key]
        except KeyError:
            return self.record(kept, key, arguments)
        if call is None or call.driver is not driver.active or any(call.hooks) or observed() or dispatch.dispatch_modes():
            return self.function(*arguments)
        if call.device == call.driver.get_current_device():
            return repeated(call, flat, addresses, tensors)
        with torch.accelerator.device_index(call.device):
            return repeated(call, flat, addresses, tensors)

    def kind(self, types):
        if not all(issubclass(each, _OPTIONS) or each in _PLAIN for each in types):
            return None  # a subclass of a tensor: whatever it does
        numbers = [k < len(self.names) and self.list_at is None and self.names[k] in NUMBERS for k in range(len(types))]
        return _reader([each in _PLAIN for each in types], numbers), {}

    def record(self, kept, key, arguments):
        """Runs the op, and keeps what it did, unless that cannot be repeated."""
        try:
            seen = observed()
        except _UNKNOWN as error:
            kept[key], seen = _unknown(error), True
        if seen or dispatch.traced() or _recorder.launches is not None:
            return self.function(*arguments)
        # a tensor that is given twice must not be taken for itself in another call, where there are two
        own = {}
        arguments = [
            [_distinct(y, own) for y in x] if x.__class__ is list else _distinct(x, own) if isinstance(x, torch.Tensor) else x
            for x in arguments
        ]
        _recorder.tensors, _recorder.launches = [], []
        try:
            result = self.function(*arguments)
            if len(kept) >= MOST:
                kept.clear()
            try:
                kept[key] = self.keep(arguments, list(own.values()), result)
            except _UNKNOWN as error:
                kept[key] = _unknown(error)
            return result
        finally:
            _recorder.tensors = _recorder.launches = None

    def keep(self, arguments, given, result):
        """What `repeated` needs, or None where something happened that it would not repeat."""
        tensors, launches, device = [*given, *_recorder.tensors], _recorder.launches, _recorder.device
        devices = {x.device for x in tensors}
        place = {id(x): k for k, x in enumerate(tensors)}
        if not launches or len(devices) != 1 or not all(_repeatable(each.kernel, each.compiled) for each in launches):
            return None
        allocations = [(x.shape, x.stride(), x.dtype, x.device) for x in _recorder.tensors]
        if any(x.data_ptr() % 16 for x in _recorder.tensors):
            return None
        kept = []
        for kernel, compiled, programs, positional, parameters in launches:
            named = {**dict(zip(kernel.arg_names, positional, strict=False)), **parameters}
            values, addresses, numbers = [named[name] for name in kernel.arg_names], [], []
            for at, (name, value) in enumerate(zip(kernel.arg_names, values, strict=True)):
                if isinstance(value, torch.Tensor):
                    if id(value) not in place:
                        return None  # a copy
                    addresses.append((at, place[id(value)]))
                    values[at] = None
                elif name in NUMBERS and name in self.names[: len(arguments)]:
                    number = self.names.index(name)
                    if arguments[number] is None:
                        continue  # then it is None in all calls of this kind
                    if arguments[number] != value or not _free(kernel, name):
                        return None
                    numbers.append((at, number))
            handles = compiled.run, compiled.function, compiled.packed_metadata
            kept.append(_Kept(compiled, *handles, programs, values, addresses, numbers))
        try:
            places = _places(result, place)
        except KeyError:
            return None
        return _Call(driver.active, device, [each.kernel.pre_run_hooks for each in launches], allocations, kept, places)


def _reader(are_tensors, are_numbers):
    """Takes the arguments of an op, and returns what a call depends on besides their types, the tensors among them, their
    addresses and all of those together. It is written for the types, since a loop over them takes 2 µs more."""
    names = [f"x{k}" for k in range(len(are_tensors))]
    tensors = [name for name, is_tensor in zip(names, are_tensors, strict=True) if is_tensor]
    addresses = [f"{name}_at" for name in tensors]
    key = [
        f"{name}.shape, {name}.stride(), {name}.dtype, {name}.device, {name}.is_neg()" if is_tensor else name
        for name, is_tensor, is_number in zip(names, are_tensors, are_numbers, strict=True)
        if not is_number
    ]
    lines = [
        f"def read({', '.join(names)}):",
        *(f"    {address} = {name}.data_ptr()" for address, name in zip(addresses, tensors, strict=True)),
        f"    key = ({', '.join(key)},)",
        f"    return key, [{', '.join(tensors)}], [{', '.join(addresses)}], {' | '.join(addresses)}",
    ]
    made = {}
    exec("\n".join(lines), made)
    return made["read"]


def repeated(call, arguments, addresses, tensors):
    _, device, _, allocations, launches, result = call
    for shape, stride, dtype, where in allocations:
        x = torch.empty_strided(shape, stride, dtype=dtype, device=where)
        tensors.append(x)
        addresses.append(x.data_ptr())
    stream = call.driver.get_current_stream(device)
    for _, run, function, metadata, programs, values, places, numbers in launches:
        values = values.copy()
        for at, place in places:
            values[at] = addresses[place]
        for at, position in numbers:
            values[at] = arguments[position]
        run(programs, 1, 1, stream, function, metadata, None, None, None, *values)
    kind = result.__class__
    if kind is int:
        return tensors[result]
    return None if result is None else kind([tensors[place] for place in result])


def observed():
    """Whether someone sees to each launch by Triton: a profiler, a debugger, a sanitizer."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook  # chains of hooks, or one hook, or None
    return (
        getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or runtime.debug
        or knobs.compilation.instrumentation_mode
        or getattr(runtime, "add_stages_inspection_hook", None) is not None  # from 3.7 on
    )


def _distinct(x, own):
    """`x`, or a view of it where it has come before."""
    x = x.view_as(x) if id(x) in own else x
    own[id(x)] = x
    return x


def _places(result, place):
    if result is None:
        return None
    return place[id(result)] if isinstance(result, torch.Tensor) else type(result)(place[id(x)] for x in result)


def _free(kernel, name):
    """Whether the value of a kernel's argument has no say in which of its compiled kernels is launched."""
    annotation = kernel.signature.parameters[name].annotation
    return annotation is tl.float64 or (annotation is tl.int64 and name in kernel.do_not_specialize)


def _repeatable(kernel, compiled):
    """Whether a launch can be repeated without Triton's help."""
    if not isinstance(compiled, CompiledKernel):
        return False
    lacks = [name for where, names in ((kernel, _KERNEL), (compiled, _COMPILED)) for name in names if not hasattr(where, name)]
    if lacks:
        _say(f"a kernel or what it is compiled to has no {', '.join(lacks)}")
    return not lacks and not _problem(type(compiled.run))


def _unknown(error):
    """None, what is kept of a call where something about Triton is not as it is taken to be."""
    _say(f"{type(error).__name__}: {error}")


@functools.cache
def _say(problem):
    _log.info("every launch takes the way through Triton's dispatch, which is slower: %s", problem)


@functools.cache
def _problem(launcher):
    """What is not as it is taken to be about Triton and this class of its launchers, or ""."""
    problem = _found(launcher)
    if problem:
        _say(problem)
    return problem


def _found(launcher):
    try:
        *names, rest = inspect.signature(launcher.__call__).parameters.values()
    except (TypeError, ValueError) as error:
        return f"what {launcher.__name__} takes cannot be found out: {error}"
    names = tuple(parameter.name for parameter in names[1:])  # the first is the launcher itself
    if len(names) < 5 or names != _LAUNCHER[: len(names)] or rest.kind is not inspect.Parameter.VAR_POSITIONAL:
        return f"{launcher.__name__} takes {', '.join(names)}, {rest}"
    expected = {knobs.runtime: ("launch_enter_hook", "launch_exit_hook", "debug"), knobs.compilation: ("instrumentation_mode",)}
    missing = [name for where, names in expected.items() for name in names if not hasattr(where, name)]
    if missing:
        return f"triton.knobs has no {', '.join(missing)}"
    if (target := driver.active.get_current_target()).backend != "cuda":
        return f"on {target.backend} more than shapes, types and alignments decides which kernel is launched"  # storages' sizes
    return ""
