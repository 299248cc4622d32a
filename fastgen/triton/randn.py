"""z itself: the contract's normals with nothing done to them."""

import triton
import triton.language as tl

from .common import op
from .common.driver import elements_of, place_of, tile_normals
from .common.elementwise import wide
from .common.host_device import stored
from .common.op import wrap_triton


@triton.jit(do_not_specialize=["seed", "offset", "batch"])
def randn_kernel(
    out,
    seeds,
    seed: tl.int64,
    offset: tl.int64,
    batch,
    event,
    blocks,
    R: tl.constexpr,
    SEEDS: tl.constexpr,
    S: tl.constexpr,
    E: tl.constexpr,
    V: tl.constexpr,
    LAYOUT: tl.constexpr,
    WIDE: tl.constexpr,
):
    block, b, live = place_of(tl.program_id(0), blocks, batch, S, LAYOUT, WIDE)
    z = tile_normals(block, b, live, wide(offset), seeds, seed, event, 1, R, SEEDS, S, E, V, LAYOUT, WIDE)
    j, inside = elements_of(block, 0, event, 1, 1, S, E, LAYOUT, WIDE)
    tl.store(out + b.to(tl.int64) * event + j, stored(z[0], out), mask=inside & live)


def randn(out, o):
    batch = op.batch_of(out)
    z = op.noise_of(None, o.seeds, o.seed, out)
    if batch.channels_last or not out.is_contiguous() or z.kind == op.elementwise.NO_NOISE.value:
        raise RuntimeError("expected a contiguous out, and a seed")
    cut = op.tiling(batch, (out,), seeded=True, merge=False)
    op.launch(
        wrap_triton(randn_kernel),
        *(cut.tiles * cut.blocks, out, out, z.seeds, z.seed, o.offset, cut.batch, cut.event, cut.blocks),
        R=op.arithmetic_of(out),
        SEEDS=z.seeds_kind,
        **cut.parameters,
    )
