"""The PTX machine (tests/ptx), by kernels of a few lines: what each instruction does, beside NumPy, and that it notices faults."""

import ctypes
import math
import os
import re

import numpy as np
import ptx_machine
import pytest
import torch

pytestmark = pytest.mark.skipif(
    not ptx_machine.LIBRARY, reason="needs the machine: python tests/device_on_ptx.py tests/test_ptx.py"
)
LANES = 32
DTYPES = {
    "u16": np.uint16,
    "s16": np.int16,
    "u32": np.uint32,
    "s32": np.int32,
    "u64": np.uint64,
    "s64": np.int64,
    "f32": np.float32,
    "f64": np.float64,
    "f16": np.float16,
}


def kernel(body, parameters=1, more=""):
    declared = ", ".join(f".param .u64 p{k}" for k in range(parameters))
    pointers = "\n".join(f"ld.param.u64 %p{k}, [p{k}];" for k in range(parameters))
    registers = (
        ".reg .u64 %p<9>; .reg .b16 %h<9>; .reg .b32 %r<20>; .reg .b64 %d<20>; .reg .f32 %f<9>; .reg .f64 %g<9>; .reg .pred %q<9>;"
    )
    head = ".version 9.0\n.target sm_90\n.address_size 64\n"
    return f"{head}{more}\n.visible .entry k({declared})\n{{\n{registers}\n{pointers}\nmov.u32 %r0, %tid.x;\n{body}\nret;\n}}\n"


def run(body, *arguments, grid=1, threads=LANES, more="", **settings):
    with ptx_machine.settings(**settings):
        ptx_machine.Module(kernel(body, len(arguments), more)).launch("k", grid, threads, arguments)


# behind a setp of two predicates: 1 where the first holds, and 2 where the second does
BOTH_PREDICATES = "%q1|%q2, %s0, %s1; selp.u32 %r9, 1, 0, %q1; selp.u32 %r10, 2, 0, %q2; or.b32 %result, %r9, %r10; //"


def bits(width):
    return {1: ".pred", 2: ".b16", 4: ".b32", 8: ".b64"}[width]


def elementwise(opcode, result, *sources):
    """opcode of each lane's sources, NumPy arrays of up to 32 elements; a result of this dtype."""
    count = len(sources[0])
    buffers = [torch.tensor(np.ascontiguousarray(a).view(np.uint8)) for a in sources]
    out = torch.zeros(count * np.dtype(result).itemsize, dtype=torch.uint8)
    loads, names = [], []
    for k, a in enumerate(sources):
        size = a.dtype.itemsize
        loads.append(
            f".reg {bits(size)} %s{k}; mul.wide.u32 %d1, %r0, {size}; add.s64 %d1, %d1, %p{k}; ld.global.b{8 * size} %s{k}, [%d1];"
        )
        names.append(f"%s{k}")
    size = np.dtype(result).itemsize
    text = f"""
    setp.ge.u32 %q0, %r0, {count}; @%q0 bra $L_end;
    {" ".join(loads)}
    .reg {bits(size)} %result; {opcode} %result, {", ".join(names)};
    mul.wide.u32 %d1, %r0, {size}; add.s64 %d1, %d1, %p{len(sources)}; st.global.b{8 * size} [%d1], %result;
    $L_end:"""
    run(text, *buffers, out)
    return out.numpy().view(result)


def numbers(name, seed=0):
    """32 of a type, the awkward ones among them."""
    dtype, rng = DTYPES[name], np.random.default_rng(seed)
    if np.issubdtype(dtype, np.floating):
        info = np.finfo(dtype)
        special = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, info.max, -info.max, info.tiny, info.smallest_subnormal, 0.5]
        return np.concatenate([np.array(special, dtype), (rng.standard_normal(20) * 10 ** rng.uniform(-3, 3, 20)).astype(dtype)])
    info = np.iinfo(dtype)
    special = [0, 1, 2, info.max, info.max - 1, info.min, info.min + 1, 7]
    return np.concatenate([np.array(special, dtype), rng.integers(info.min, info.max, 24, dtype, endpoint=True)])


def pairs(name):
    """Two arrays of 32, in which special values meet."""
    a, b = numbers(name, 1), numbers(name, 2)
    return a, np.roll(b, 3)


def same(actual, expected):
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("name", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_integers(name):
    a, b = pairs(name)
    wide = [int(x) * int(y) for x, y in zip(a, b, strict=True)]
    width = 8 * a.dtype.itemsize
    low = np.array([x % 2**width for x in wide], dtype=f"u{a.dtype.itemsize}").view(a.dtype)
    with np.errstate(over="ignore"):
        same(elementwise(f"add.{name}", a.dtype, a, b), a + b)
        same(elementwise(f"sub.{name}", a.dtype, a, b), a - b)
    same(elementwise(f"mul.lo.{name}", a.dtype, a, b), low)
    same(elementwise(f"mul.hi.{name}", a.dtype, a, b), np.array([x >> width for x in wide], dtype=object).astype(a.dtype))
    same(elementwise(f"min.{name}", a.dtype, a, b), np.minimum(a, b))
    same(elementwise(f"max.{name}", a.dtype, a, b), np.maximum(a, b))
    nonzero = np.where(b == 0, 3, b).astype(b.dtype)
    with np.errstate(over="ignore"):
        quotients = [abs(int(x)) // abs(int(y)) * (1 if (x < 0) == (y < 0) else -1) for x, y in zip(a, nonzero, strict=True)]
    expected = np.array([q % 2**width for q in quotients], dtype=object).astype(f"u{a.dtype.itemsize}").view(a.dtype)
    same(elementwise(f"div.{name}", a.dtype, a, nonzero), expected)
    remainders = [int(x) - q * int(y) for x, y, q in zip(a, nonzero, quotients, strict=True)]
    same(elementwise(f"rem.{name}", a.dtype, a, nonzero), np.array(remainders, dtype=object).astype(a.dtype))
    shifts = np.array([0, 1, 5, 15, 16, 31, 32, 63, 64, 200] * 4, np.uint32)[:LANES]
    expected = [int(x) >> min(int(n), 200) if name[0] == "s" or n < width else 0 for x, n in zip(a, shifts, strict=True)]
    same(elementwise(f"shr.{name}", a.dtype, a, shifts), np.array(expected, dtype=object).astype(a.dtype))
    left = [(int(x) << int(n)) % 2**width for x, n in zip(a, shifts, strict=True)]
    same(elementwise(f"shl.b{width}", a.dtype, a, shifts), np.array(left, dtype=f"u{a.dtype.itemsize}").view(a.dtype))
    same(elementwise(f"xor.b{width}", a.dtype, a, b), a ^ b)
    same(elementwise(f"not.b{width}", a.dtype, a), ~a)


@pytest.mark.parametrize("name, wide", [("u16", "u4"), ("s16", "i4"), ("u32", "u8"), ("s32", "i8")])
def test_products_of_twice_the_width(name, wide):
    a, b = pairs(name)
    c = np.arange(LANES).astype(wide)
    same(elementwise(f"mul.wide.{name}", wide, a, b), a.astype(wide) * b.astype(wide))
    with np.errstate(over="ignore"):
        same(elementwise(f"mad.wide.{name}", wide, a, b, c), a.astype(wide) * b.astype(wide) + c)


@pytest.mark.parametrize("name", ["f32", "f64"])
def test_reals(name):
    a, b = pairs(name)
    with np.errstate(all="ignore"):
        same(elementwise(f"add.rn.{name}", a.dtype, a, b), a + b)
        same(elementwise(f"sub.rn.{name}", a.dtype, a, b), a - b)
        same(elementwise(f"mul.rn.{name}", a.dtype, a, b), a * b)
        same(elementwise(f"div.rn.{name}", a.dtype, a, b), a / b)
        same(elementwise(f"rcp.rn.{name}", a.dtype, a), 1 / a)
        same(elementwise(f"sqrt.rn.{name}", a.dtype, a), np.sqrt(a))
    same(elementwise(f"min.{name}", a.dtype, a, b), np.fmin(a, b))
    same(
        elementwise(f"max.NaN.{name}" if name == "f32" else f"max.{name}", a.dtype, a, b),
        (np.maximum if name == "f32" else np.fmax)(a, b),
    )
    for opcode, expected in (("neg", -a), ("abs", np.abs(a))):
        found = elementwise(f"{opcode}.{name}", a.dtype, a)
        same(np.signbit(found), np.signbit(expected))
        same(found, expected)
    x, y, z = (np.random.default_rng(s).standard_normal(LANES).astype(a.dtype) for s in range(3))
    exact = [math.fma(*map(float, each)) if hasattr(math, "fma") else None for each in zip(x, y, z, strict=True)]
    found = elementwise(f"fma.rn.{name}", a.dtype, x, y, z)
    if name == "f32":
        same(
            found, (x.astype(np.float64) * y + z).astype(np.float32)
        )  # the product is exact; twice rounded, which hardly ever differs
    elif exact[0] is not None:
        same(found, exact)


def test_arithmetic_makes_one_nan():
    a = np.array([np.nan, -np.nan, np.inf], np.float32)
    a.view(np.uint32)[1] = 0xFFC12345
    found = elementwise("add.rn.f32", np.uint32, a, np.array([1, 1, -np.inf], np.float32))
    same(found, np.full(3, 0x7FFFFFFF))


@pytest.mark.parametrize(
    "relation, expected", [("eq", np.equal), ("lt", np.less), ("le", np.less_equal), ("gt", np.greater), ("ge", np.greater_equal)]
)
@pytest.mark.parametrize("name", ["s32", "u64", "f32", "f64"])
def test_comparisons(relation, expected, name):
    a, b = pairs(name)
    b = np.where(np.arange(LANES) % 3 == 0, a, b)
    opcode = f"setp.{relation}.{name}"

    def asked(opcode):
        return elementwise(f"{opcode} {BOTH_PREDICATES}", np.uint32, a, b)

    truth = expected(a, b)
    same(asked(opcode), np.where(truth, 1, 2))
    if name[0] == "f":
        same(asked(opcode.replace(relation, relation + "u")), np.where(truth | np.isnan(a) | np.isnan(b), 1, 2))


def test_bits():
    a, b = pairs("u32")
    c = np.random.default_rng(5).integers(0, 2**32, LANES, np.uint32)
    for table in (0xBE, 0xE8, 0x96, 0x1B):
        expected = np.zeros(LANES, np.uint32)
        for k in range(8):
            if table >> k & 1:
                expected |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
        same(elementwise(f"lop3.b32 %result, %s0, %s1, %s2, {table}; //", np.uint32, a, b, c), expected)
    both = [int(x) | int(y) << 32 for x, y in zip(a, b, strict=True)]
    selectors = c & 0xFFFF
    expected = []
    for v, selector in zip(both, selectors, strict=True):
        parts = [v >> 8 * (int(selector) >> 4 * k & 7) & 0xFF for k in range(4)]
        signs = [int(selector) >> 4 * k & 8 for k in range(4)]
        expected.append(sum((0xFF * (p >> 7) if s else p) << 8 * k for k, (p, s) in enumerate(zip(parts, signs, strict=True))))
    same(elementwise("prmt.b32", np.uint32, a, b, selectors), np.array(expected, np.uint32))
    position, length = np.arange(LANES, dtype=np.uint32), (np.arange(LANES, dtype=np.uint32) * 7) % 34
    expected = [int(x) >> int(p) & (1 << int(n)) - 1 for x, p, n in zip(a, position, length, strict=True)]
    same(elementwise("bfe.u32", np.uint32, a, position, length), np.array(expected, np.uint32))
    signed = a.view(np.int32)
    sign = []  # of as many bits as there are the sign is the highest one, and beyond it all are that
    for x, p, n in zip(signed, position, length, strict=True):
        low = (int(x) >> int(p)) % (1 << int(n))
        sign.append(low - (1 << int(n)) if n and low >> int(n - 1) else low)
    same(elementwise("bfe.s32", np.int32, signed, position, length), np.array(sign))


CONVERSIONS = [
    *("cvt.u32.u16", "cvt.s32.s16", "cvt.u16.u32", "cvt.s64.s32", "cvt.u64.u32", "cvt.u32.u64", "cvt.s32.s64"),
    *(
        "cvt.rn.f32.s32",
        "cvt.rn.f32.u32",
        "cvt.rn.f64.s64",
        "cvt.rn.f64.u32",
        "cvt.rn.f32.f64",
        "cvt.f64.f32",
        "cvt.f32.f16",
        "cvt.rn.f16.f32",
    ),
]


@pytest.mark.parametrize("opcode", CONVERSIONS)
def test_conversions(opcode):
    to, of = opcode.split(".")[-2:]
    a = numbers(of)
    with np.errstate(all="ignore"):
        same(elementwise(opcode, DTYPES[to], a), a.astype(DTYPES[to]))


@pytest.mark.parametrize("how, function", [("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)])
def test_reals_become_integers(how, function):
    a = np.array([0.5, 1.5, -0.5, -2.5, 3e9, -3e9, 1e20, -1e20, np.inf, -np.inf, np.nan, 2147483520.0], np.float32)
    wide = function(a.astype(np.float64))
    expected = np.where(np.isnan(a), 0, np.clip(wide, -(2**31), 2**31 - 1)).astype(np.int32)
    same(elementwise(f"cvt.{how}.s32.f32", np.int32, a), expected)
    same(elementwise(f"cvt.{how}.f32.f32", np.float32, a), function(a))
    with np.errstate(over="ignore"):
        halves = a.astype(np.float16)
    same(elementwise(f"cvt.{how}.f16.f16", np.float16, halves), function(halves))


def test_a_nan_is_no_number():
    """Of 64 bits on either side it becomes the highest bit, else 0."""
    for to, of, expected in (("s32", "f32", 0), ("s32", "f64", -(2**31)), ("u32", "f64", 2**31), ("s64", "f32", -(2**63))):
        assert elementwise(f"cvt.rzi.{to}.{of}", DTYPES[to], np.array([np.nan], DTYPES[of]))[0] == expected


def test_bfloat16():
    a, b = pairs("f32")
    found = torch.tensor(elementwise("cvt.rn.bf16x2.f32", np.uint32, a, b).view(np.int16)).view(torch.bfloat16)
    expected = torch.tensor(np.stack([b, a], 1).reshape(-1)).bfloat16()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    found = elementwise("cvt.f32.bf16", np.float32, expected.view(torch.int16).numpy().view(np.uint16)[:LANES])
    same(found, expected.float().numpy()[:LANES])


APPROXIMATE = {  # the function, and the largest error that the ISA states: of the value's share, or absolute
    "sin": (np.sin, 0, 2**-20.5),
    "cos": (np.cos, 0, 2**-20.5),
    "lg2": (np.log2, 2**-22, 2**-22),
    "ex2": (np.exp2, 2**-22, 0),
    "sqrt": (np.sqrt, 2**-23, 0),
    "rcp": (lambda a: 1 / a, 2**-23, 0),
}


@pytest.mark.parametrize("perturbed", [False, True])
@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximate_functions(name, perturbed):
    function, share, absolute = APPROXIMATE[name]
    a = np.random.default_rng(0).uniform(0.01, 6, LANES).astype(np.float32)
    with ptx_machine.settings(perturbed=perturbed):
        out, x = torch.zeros(LANES), torch.tensor(a)
        text = f"""mul.wide.u32 %d1, %r0, 4; add.s64 %d2, %d1, %p0; add.s64 %d3, %d1, %p1; ld.global.f32 %f1, [%d2];
        {name}.approx.f32 %f2, %f1; st.global.f32 [%d3], %f2;"""
        ptx_machine.Module(kernel(text, 2)).launch("k", 1, LANES, (x, out))
    exact = function(a.astype(np.float64))
    error = np.abs(out.numpy() - exact)
    rounding = np.spacing(np.abs(exact).astype(np.float32)) / 2
    bound = share * np.abs(exact) if not absolute else np.full(LANES, absolute)
    if name == "lg2":  # near 1, where it is small, the error itself is bound, elsewhere its share
        bound = np.where((a > 0.5) & (a < 2), absolute, share * np.abs(exact))
    assert (error <= bound + 1.01 * rounding).all()
    assert (error > 1.01 * rounding).any() == perturbed or absolute == 0 == share


@pytest.mark.parametrize("name, dtype", [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_two_in_a_register(name, dtype):
    """Signs and comparisons of packed halves, and what moves them in and out."""
    a, b = (torch.tensor(x).to(dtype) for x in pairs("f32"))
    packed = [x.view(torch.int16).numpy().view(np.uint32) for x in (a, b)]
    low = lambda x: x.view(-1, 2)[:, 0]  # noqa: E731
    high = lambda x: x.view(-1, 2)[:, 1]  # noqa: E731
    for opcode, expected in (("neg", -a), ("abs", a.abs())):
        found = torch.tensor(elementwise(f"{opcode}.{name}x2", np.uint32, packed[0]).view(np.int16)).view(dtype)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        same(found.signbit().numpy(), expected.signbit().numpy())
    for relation, function in (("lt", torch.lt), ("gtu", lambda x, y: (x > y) | x.isnan() | y.isnan())):
        found = elementwise(f"setp.{relation}.{name}x2 {BOTH_PREDICATES}", np.uint32, *packed)
        same(found, (function(low(a), low(b)).int() + 2 * function(high(a), high(b)).int()).numpy())
        one = f"setp.{relation}.{name} %q1, %h1, %h2; selp.u32 %result, 1, 0, %q1; //"
        found = elementwise(f"mov.b32 {{%h1, _}}, %s0; mov.b32 {{%h2, _}}, %s1; {one}", np.uint32, *packed)
        same(found, function(low(a), low(b)).int().numpy())
    swapped = elementwise("mov.b32 {%h1, %h2}, %s0; mov.b32 %result, {%h2, %h1}; //", np.uint32, packed[0])
    same(swapped, (packed[0] >> 16) | (packed[0] << 16))


def test_vectors_of_four_halves():
    a = numbers("u64")
    found = elementwise("mov.b64 {%h1, %h2, %h3, %h4}, %s0; mov.b64 %result, {%h4, %h3, %h2, %h1}; //", np.uint64, a)
    same(found.view(np.uint16).reshape(-1, 4)[:, ::-1], a.view(np.uint16).reshape(-1, 4))
    found = elementwise("mov.b64 {%r1, %r2}, %s0; mov.b64 %result, {%r2, %r1}; //", np.uint64, a)
    same(found, (a >> np.uint64(32)) | (a << np.uint64(32)))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices(count, transposed):
    """Of 8×8: lane l has row l/4, columns 2(l%4) and one more; stored, and then loaded transposed or not."""
    values = np.arange(count * 64, dtype=np.uint16).reshape(count, 8, 8) * 17 + 3
    lanes = torch.tensor(values.reshape(count, 32, 2).transpose(1, 0, 2).copy().view(np.int32).reshape(32, count))
    out = torch.zeros(32, count, dtype=torch.int32)
    registers = "{" + ", ".join(f"%r{5 + k}" for k in range(count)) + "}"
    vector = {1: "b32", 2: "v2.b32", 4: "v4.b32"}[count]
    how = ".trans" if transposed else ""
    run(
        f"""mul.wide.u32 %d1, %r0, {4 * count}; add.s64 %d2, %d1, %p0; add.s64 %d3, %d1, %p1;
        ld.global.{vector} {registers}, [%d2]; mov.u32 %r1, room; shl.b32 %r2, %r0, 4; add.u32 %r1, %r1, %r2;
        stmatrix.sync.aligned.m8n8.x{count}.shared.b16 [%r1], {registers};
        ldmatrix.sync.aligned.m8n8.x{count}{how}.shared.b16 {registers}, [%r1]; st.global.{vector} [%d3], {registers};""",
        lanes,
        out,
        more=SHARED,
    )
    found = out.numpy().view(np.uint16).reshape(32, count, 2).transpose(1, 0, 2).reshape(count, 8, 8)
    same(found, values.transpose(0, 2, 1) if transposed else values)


@pytest.mark.parametrize("width", [4, 8, 16])
@pytest.mark.parametrize("way", ["up", "down", "bfly", "idx"])
def test_shuffles_of_part_of_a_warp(way, width):
    """As CUDA's with a width: lanes have those of their own group of `width`."""
    out = torch.zeros(LANES, dtype=torch.int32)
    bounds = (32 - width) << 8 | (0 if way == "up" else 31)
    text = (
        f"shfl.sync.{way}.b32 %r1, %r0, 3, {bounds}, -1; mul.wide.u32 %d1, %r0, 4; add.s64 %d1, %d1, %p0; st.global.u32 [%d1], %r1;"
    )
    run(text, out)
    for n, found in enumerate(out.tolist()):
        other = {"up": n - 3, "down": n + 3, "bfly": n ^ 3, "idx": n // width * width + 3}[way]
        assert found == (other if other // width == n // width else n)


def test_lanes_that_part_meet_again():
    out = torch.zeros(LANES, dtype=torch.int32)
    run(
        """mov.u32 %r1, 0; mov.u32 %r2, %r0;
        $L_loop: setp.eq.u32 %q1, %r2, 0; @%q1 bra $L_out;
        add.u32 %r1, %r1, %r2; sub.u32 %r2, %r2, 1; bra $L_loop;
        $L_out: shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;
        mul.wide.u32 %d1, %r0, 4; add.s64 %d1, %d1, %p0; st.global.u32 [%d1], %r3;""",
        out,
    )
    sums = [n * (n + 1) // 2 for n in range(LANES)]
    assert out.tolist() == [sums[n ^ 1] for n in range(LANES)]


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize(
    "way, expected",
    [
        ("up", lambda n: n - 3 if n >= 3 else n),
        ("down", lambda n: n + 3 if n <= 28 else n),
        ("bfly", lambda n: n ^ 3),
        ("idx", lambda n: 3),
    ],
)
def test_shuffles(way, expected, order):
    out = torch.zeros(2 * LANES, dtype=torch.int32)
    clamp = 0 if way == "up" else 31
    text = f"""shfl.sync.{way}.b32 %r1|%q1, %r0, 3, {clamp}, 0xFFFFFFFF; selp.u32 %r2, 1, 0, %q1;
    mul.wide.u32 %d1, %r0, 8; add.s64 %d1, %d1, %p0; st.global.v2.u32 [%d1], {{%r1, %r2}};"""
    run(text, out, order=order)
    found = out.view(LANES, 2)
    assert found[:, 0].tolist() == [expected(n) for n in range(LANES)]
    assert found[:, 1].tolist() == [int(way in ("bfly", "idx") or expected(n) != n) for n in range(LANES)]


SHARED = ".shared .align 16 .b8 room[512];"
EXCHANGE = """mov.u32 %r1, room; shl.b32 %r2, %r0, 2; add.u32 %r3, %r1, %r2; st.shared.u32 [%r3], %r0; {between}
xor.b32 %r4, %r2, 124; add.u32 %r5, %r1, %r4; xor.b32 %r5, %r5, 128; ld.shared.u32 %r6, [%r5];
mul.wide.u32 %d1, %r0, 4; add.s64 %d1, %d1, %p0; st.global.u32 [%d1], %r6;"""


@pytest.mark.parametrize("order", [0, 1, 2])
def test_barriers(order):
    """What a warp reads another one has written; without a barrier in between that is a race."""
    out = torch.zeros(64, dtype=torch.int32)
    run(EXCHANGE.format(between="bar.sync 0;"), out, threads=64, more=SHARED, order=order)
    assert out.tolist() == [(n ^ 31) ^ 32 for n in range(64)]
    with pytest.raises(
        RuntimeError, match=r"a race on shared memory, .* thread \(\d+, 0, 0\) of block \(0, 0, 0\), line \d+ of k: (ld|st)\.shared"
    ):
        run(EXCHANGE.format(between=""), out, threads=64, more=SHARED, order=order)


FAULTS = {
    "misaligned": ("add.s64 %d1, %p0, 8; ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%d1];", "misaligned: 16 bytes"),
    "behind a tensor": ("add.s64 %d1, %p0, 512; ld.global.u32 %r1, [%d1];", "no such memory: 4 bytes"),
    "across a tensor's end": ("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%p0+496];", "no such memory: 16 bytes"),
    "before a tensor": ("st.global.u32 [%p0+-4], %r0;", "no such memory"),
    "an address that nothing has set": ("ld.global.u8 %h1, [%d9];", "no such memory: 1 bytes"),
    "before shared memory": ("mov.u32 %r1, room; ld.shared.u32 %r2, [%r1+-4];", "beyond shared memory: byte 18446744073709551612"),
    "beyond shared memory": ("mov.u32 %r1, room; st.shared.u32 [%r1+512], %r0;", "beyond shared memory: byte 512 of 512"),
    "beyond the parameters": ("ld.param.u64 %d1, [p0+8];", "beyond the parameters"),
    "a predicate that nothing has set": ("@%q5 mov.u32 %r1, 0;", "a predicate that nothing has set"),
    "a lane that takes no part": ("setp.lt.u32 %q1, %r0, 16; @%q1 shfl.sync.down.b32 %r1, %r0, 8, 31, 0xFFFF;", "takes no part"),
    "a lane that its mask leaves out": ("shfl.sync.down.b32 %r1, %r0, 8, 31, 0xFFFF;", "its mask leaves out"),
    "half a warp at the barrier": ("setp.lt.u32 %q1, %r0, 16; @%q1 ret; bar.sync 0;", "a barrier behind the end of this thread"),
    "two barriers for one": (
        "setp.lt.u32 %q1, %r0, 16; @%q1 bra $L_a; bar.sync 0; bra $L_b; $L_a: bar.sync 0; $L_b:",
        "another barrier than that of other lanes",
    ),
    "masks that differ": (
        "setp.eq.u32 %q1, %r0, 0; selp.b32 %r2, -1, 0xFFFFFFFE, %q1; bar.warp.sync %r2;",
        "a mask that is not that of other lanes",
    ),
    "a loop without an end": (
        "$L_loop: ld.relaxed.gpu.global.u32 %r1, [%p0]; setp.eq.u32 %q1, %r1, 0; @%q1 bra $L_loop;",
        "a hang",
    ),
    "a loop that waits for nothing": ("$L_loop: bra $L_loop;", "a hang"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults(name):
    text, message = FAULTS[name]
    with pytest.raises(RuntimeError, match=message) as raised:
        run(text, torch.zeros(127, dtype=torch.int32), more=SHARED)
    assert re.search(r"thread \(\d+, 0, 0\) of block \(0, 0, 0\), line 10 of k: ", str(raised.value))


@pytest.mark.parametrize(
    "text, why",
    [
        ("add.sat.s32 %r1, %r0, 1;", "no such opcode: add.sat.s32"),
        ("add.s64 %d1, %r0, 1;", "%r0 is of 4 bytes"),
        ("call foo;", "no such opcode"),
        ("bra $L_nowhere;", "no label"),
        ("bar.sync 1;", "a barrier of part of a block"),
        ("mov.u32 %r1, nothing;", "no such operand: nothing"),
        ("barrier.sync 0;", "a barrier of part of a block, or of lanes by themselves"),
        ("mov.f32 %f1, 1.5;", "no such number: 1.5"),
        ("mov.u32 %r1, 4U9;", "no such number: 4U9"),
        ("ld.global.u32 %r1, [%p0+4x];", "no such number: 4x"),
        ("discard.global.L2 [%p0], 128;", "no such opcode: discard.global.L2"),
        ("st.release.cta.global.u32 [%p0], 1;", ".cta"),
        ("cvt.rn.f16.f64 %h1, %g1;", "no such opcode: cvt.rn.f16.f64"),
        ("cvt.rn.bf16.s32 %h1, %r1;", "no such opcode: cvt.rn.bf16.s32"),
        (".shared .b8 more[16];", "shared memory behind that whose size comes with the launch"),
    ],
)
def test_what_is_not_understood_is_refused(text, why):
    line = 10  # of the first instruction in `kernel`
    with pytest.raises(RuntimeError, match=rf"PTX not understood, line \d+ of k: .*{re.escape(why)}") as raised:
        run(text, torch.zeros(4), more=".extern .shared .align 16 .b8 any[];")
    assert int(re.search(r"line (\d+)", str(raised.value))[1]) == line


def test_nothing_stays_of_what_was_refused():
    """A second launch would run the half that was understood."""
    out = torch.zeros(1, dtype=torch.int32)
    module = ptx_machine.Module(kernel("st.global.u32 [%p0], 7; add.sat.s32 %r1, %r0, 1;"))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no such opcode: add.sat.s32"):
            module.launch("k", 1, 1, (out,))
    assert out.item() == 0


def test_launches_that_no_gpu_takes():
    module = ptx_machine.Module(kernel(".shared .b8 room[4096];", 0).replace("{", ".maxntid 128\n{", 1))
    with pytest.raises(
        RuntimeError, match="a launch that no GPU takes"
    ):  # with what the kernel has itself, at the first launch too
        module.launch("k", 1, 128, (), 225 * 1024)
    module.launch("k", 1, 128, (), 223 * 1024)
    for grid, threads, shared in ((1, 129, 0), (0, 32, 0), ((1, 70_000), 32, 0), (1, 32, 300_000)):
        with pytest.raises(RuntimeError, match="a launch that no GPU takes"):
            module.launch("k", grid, threads, (), shared)


def test_nothing_is_what_it_was():
    """What nothing has written is NaN: tensors, registers, shared memory."""
    assert torch.empty(1000).isnan().all()
    out = torch.zeros(2 * LANES)
    run(
        """mov.u32 %r1, room; ld.shared.f32 %f1, [%r1]; mul.wide.u32 %d1, %r0, 8; add.s64 %d1, %d1, %p0;
        st.global.v2.f32 [%d1], {%f1, %f2};""",
        out,
        more=SHARED,
    )
    assert out.isnan().all()


# Block 0 writes 64 numbers and then a flag; block 1 waits for the flag and reads them.
MESSAGE = """mov.u32 %r1, %ctaid.x; mul.wide.u32 %d1, %r0, 4; add.s64 %d2, %p0, %d1;
setp.eq.u32 %q1, %r1, 1; setp.ne.u32 %q2, %r0, 0;
@%q1 bra $L_reads;
{writes}
ret;
$L_reads: {reads}
add.s64 %d3, %p2, %d1; st.global.u32 [%d3], %r6;"""
WRITES = "add.u32 %r2, %r0, 100; st.global.u32 [%d2], %r2; bar.sync 0; @%q2 ret; st.release.gpu.global.u64 [%p1], 1;"
READS = """$L_wait: ld.relaxed.gpu.global.u64 %d4, [%p1]; setp.ne.s64 %q3, %d4, 1; @%q3 bra $L_wait;
fence.acq_rel.gpu; ld.global.u32 %r6, [%d2];"""
WRONG = {
    "the flag is not released": (WRITES.replace("st.release", "st.relaxed"), READS),
    "the flag before the numbers": (
        "@%q2 bra $L_on; st.release.gpu.global.u64 [%p1], 1; $L_on: add.u32 %r2, %r0, 100; st.global.u32 [%d2], %r2;",
        READS,
    ),
    "no barrier before the flag": (WRITES.replace("bar.sync 0;", ""), READS),
    "no fence behind the flag": (WRITES, READS.replace("fence.acq_rel.gpu;", "")),
    "a fence of the block alone": (WRITES, READS.replace("fence.acq_rel.gpu;", "fence.acq_rel.cta;")),
}


def message(writes, reads, **settings):
    data, flag, out = torch.zeros(64, dtype=torch.int32), torch.zeros(1, dtype=torch.int64), torch.zeros(64, dtype=torch.int32)
    run(MESSAGE.format(writes=writes, reads=reads), data, flag, out, grid=2, threads=64, resident=2, **settings)
    return out.tolist() == list(range(100, 164))


@pytest.mark.parametrize("delayed", [0, 1])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_messages_between_blocks(order, delayed):
    for seed in range(5):
        assert message(WRITES, READS, order=order, delayed=delayed, seed=seed)


@pytest.mark.parametrize("name", WRONG)
def test_messages_that_are_wrong_are_seen_to_be(name):
    assert not all(message(*WRONG[name], order=2, delayed=1, seed=seed) for seed in range(5))


def test_a_flag_that_is_read_as_any_other_memory_stays_what_it_was():
    with pytest.raises(RuntimeError, match="a hang, thread"):
        message(WRITES, READS.replace("ld.relaxed.gpu.", "ld."), delayed=1)


@pytest.mark.parametrize("order", ["relaxed", "release"])
def test_a_warp_sees_its_own_stores_in_their_order(order):
    """Where others see them late, too, and whatever the order of each."""
    out = torch.zeros(LANES, dtype=torch.int32)
    run(
        f"""mul.wide.u32 %d1, %r0, 4; add.s64 %d1, %d1, %p0;
        st.global.u32 [%d1], 1; st.{order}.gpu.global.u32 [%d1], 2; ld.global.u32 %r1, [%d1]; add.u32 %r1, %r1, 10;
        st.{order}.gpu.global.u32 [%d1], %r1; fence.acq_rel.gpu; ld.global.u32 %r1, [%d1]; add.u32 %r1, %r1, 100;
        st.{order}.gpu.global.u32 [%d1], 5; st.global.u32 [%d1], %r1;""",
        out,
        delayed=1,
    )
    assert out.tolist() == [112] * LANES


@pytest.mark.parametrize("delayed", [0, 1])
def test_what_is_stored_behind_a_barrier_stays(delayed):
    out = torch.zeros(1, dtype=torch.int32)
    run("st.global.u32 [%p0], 1; bar.sync 0; st.global.u32 [%p0], 2;", out, threads=64, delayed=delayed)
    assert out.item() == 2


@pytest.mark.parametrize("text", ["delayed", "order 2", "reorder=2", "order=1 =3", "turn=0", "resident=0"])
def test_settings_that_there_are_not(text):
    library = ptx_machine._library
    assert library.fastgen_ptx_settings(text.encode()) != 0
    assert library.fastgen_ptx_settings(b" order=1  seed=5 ") == 0
    assert library.fastgen_ptx_settings(os.environ.get("FASTGEN_PTX", "").encode()) == 0


def test_a_block_does_not_see_what_another_one_of_its_launch_has_published():
    """Unless it acquires it: that it has begun later is no order."""
    data, out = torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    text = """mov.u32 %r1, %ctaid.x; mul.wide.u32 %d1, %r1, 4; add.s64 %d1, %d1, %p1;
    ld.global.u32 %r2, [%p0]; st.global.u32 [%d1], %r2; st.release.gpu.global.u32 [%p0], 7;"""
    run(text, data, out, grid=2, threads=1, delayed=1)
    assert out.tolist() == [0, 0]
    run(text, data, out, grid=2, threads=1, delayed=0)
    assert out.tolist() == [7, 7]
    data.zero_()
    run(text, data, out, grid=2, threads=1, delayed=0)
    assert out.tolist() == [0, 7]


def test_one_resident_block_hangs_where_it_waits_for_a_later_one():
    swapped = MESSAGE.replace("setp.eq.u32 %q1, %r1, 1", "setp.eq.u32 %q1, %r1, 0").format(writes=WRITES, reads=READS)
    data, flag, out = torch.zeros(64, dtype=torch.int32), torch.zeros(1, dtype=torch.int64), torch.zeros(64, dtype=torch.int32)
    run(swapped, data, flag, out, grid=2, threads=64, resident=2)
    flag.zero_()
    with pytest.raises(RuntimeError, match="a hang, thread"):
        run(swapped, data, flag, out, grid=2, threads=64, resident=1)


def test_numbers_as_parameters():
    out = torch.zeros(1, dtype=torch.float64)
    text = kernel(
        """ld.param.f32 %f1, [p1]; cvt.f64.f32 %g1, %f1; ld.param.u8 %h1, [p2]; cvt.rn.f64.u16 %g2, %h1;
        add.rn.f64 %g1, %g1, %g2; st.global.f64 [%p0], %g1;""",
        1,
    )
    text = text.replace(".param .u64 p0", ".param .u64 p0, .param .f32 p1, .param .u8 p2")
    ptx_machine.Module(text).launch("k", 1, 1, (out, ctypes.c_float(2.5), ctypes.c_uint8(200)))
    assert out.item() == 202.5
