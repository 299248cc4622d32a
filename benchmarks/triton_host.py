"""What a call of the Triton backend takes on the host, on a machine that need not have a GPU: one line of JSON, µs by call.

    python -m benchmarks.triton_host [--tiny]

Everything runs but the driver's own cuLaunchKernelEx: Triton's launcher is linked against a libcuda of this file, whose functions
return at once. Tensors are on the device "meta", which has no memory, so that allocating takes about as long as from torch's cache
on a GPU. Each call is timed as it is and with Triton's own dispatch in place of direct launches, in turns, on one thread; the
fastest of many rounds counts, since what disturbs a round only makes it slower.
"""

import argparse
import ctypes
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

LIBCUDA = """
#include <stddef.h>
#include <stdint.h>
static int context;
long launches;
int cuCtxGetCurrent(void **c) { *c = &context; return 0; }
int cuCtxGetDevice(int *d) { return *d = 0; }
int cuCtxGetLimit(size_t *v, int limit) { *v = 1 << 20; return 0; }
int cuDeviceGet(int *d, int ordinal) { *d = ordinal; return 0; }
int cuDeviceGetAttribute(int *v, int attribute, int d) { *v = 232448; return 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) { *c = &context; return 0; }
int cuDriverGetVersion(int *v) { *v = 13000; return 0; }
int cuFuncGetAttribute(int *v, int attribute, void *f) { *v = attribute == 0 ? 1024 : 0; return 0; }
int cuGetErrorString(int error, const char **s) { *s = "no driver"; return 0; }
int cuModuleGetFunction(void **f, void *m, const char *name) { *f = &launches; return 0; }
int cuModuleLoadData(void **m, const void *image) { *m = &context; return 0; }
int cuPointerGetAttribute(void *v, int attribute, uint64_t p) { *(uint64_t *)v = p; return 0; }
int cuStreamIsCapturing(void *s, int *v) { return *v = 0; }
int cuLaunchKernelEx(const void *config, void *f, void **arguments, void **extra) { launches++; return 0; }
"""
# what else Triton's driver.c asks for, and nobody calls here
UNUSED = (
    *("cuCtxSetCurrent", "cuCtxSetLimit", "cuFuncSetAttribute", "cuFuncSetCacheConfig", "cuModuleUnload"),
    *("cuOccupancyMaxActiveClusters", "cuPointerGetAttributes", "cuTensorMapEncodeIm2col", "cuTensorMapEncodeTiled"),
)
SHAPE, LARGE = (16, 4, 8, 8), (16, 3, 64, 64)


def compiler():
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def libcuda(folder):
    """The library, loaded, so that what asks for "libcuda.so.1" later finds this one."""
    source, made = Path(folder, "libcuda.c"), Path(folder, "libcuda.so.1")
    source.write_text(LIBCUDA + "".join(f"int {name}() {{ return 0; }}\n" for name in UNUSED))
    subprocess.run([compiler(), "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", "-o", made, source], check=True)
    made.with_name("libcuda.so").symlink_to(made)
    return ctypes.CDLL(str(made), mode=ctypes.RTLD_GLOBAL)


def pretend(folder):
    """An H100 of which Triton's own driver knows, without a GPU."""
    library = libcuda(folder)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    class Driver(CudaDriver):
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    triton.knobs.nvidia.libcuda_path = folder
    driver = Driver()
    driver.get_current_device, driver.get_current_stream = (lambda: 0), (lambda device: 0)
    triton.runtime.driver.set_active(driver)
    torch.accelerator.current_device_index = lambda: None  # the index of the device "meta"

    from fastgen._core import backends

    backends._why_not = lambda name, device: ""
    return library


def calls():
    import fastgen

    schedule = fastgen.Schedule.linear(1000)
    with torch.device("meta"):
        x, m, u, large, logits = (torch.empty(shape) for shape in (SHAPE, SHAPE, SHAPE, LARGE, (64, 1)))
        t, seeds = (torch.empty(SHAPE[0], dtype=torch.int64) for _ in range(2))
    return {
        "q_sample, seed": lambda: fastgen.q_sample(x, 5, schedule, seed=3),
        "q_sample, t, noise": lambda: fastgen.q_sample(x, t, schedule, noise=m),
        "ddpm_step, seed": lambda: fastgen.ddpm_step(x, m, 5, schedule, seed=3),
        "ddpm_step, t, clip, seeds": lambda: fastgen.ddpm_step(x, m, t, schedule, seed=seeds, clip=1.0),
        "ddpm_step, seed, out": lambda: fastgen.ddpm_step(x, m, 5, schedule, seed=3, out=x),
        "ddpm_step, guidance": lambda: fastgen.ddpm_step(x, m, 5, schedule, seed=3, unconditional_output=u, guidance_scale=7.5),
        "ddim_step": lambda: fastgen.ddim_step(x, m, 5, schedule),
        "q_posterior": lambda: fastgen.q_posterior(x, m, 5, schedule),
        "randn": lambda: fastgen.randn(SHAPE, seed=3, device="meta"),
        "diffusion_loss, t, seed": lambda: fastgen.diffusion_loss(m, x, t, schedule, seed=3),
        "diffusion_loss, large": lambda: fastgen.diffusion_loss(large, large, t, schedule, seed=3),
        "bce_with_logits": lambda: fastgen.bce_with_logits(logits, logits),
        "bce_with_logits, large": lambda: fastgen.bce_with_logits(large, large),
        "generator_loss": lambda: fastgen.generator_loss(logits),
        "discriminator_loss": lambda: fastgen.discriminator_loss(logits, logits),
    }


def seconds(function, times):
    """Of one call, of so many."""
    start = time.perf_counter()
    for _ in range(times):
        function()
    return (time.perf_counter() - start) / times


def measure(rounds, times):
    """{call: {"direct" and "dispatch": µs, "launches": how many}}, and what one `torch.add` of 16 elements takes on this CPU."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        library = pretend(folder)
        import fastgen
        from fastgen.triton.common import direct

        launches = ctypes.c_long.in_dll(library, "launches")

        own, ordinary = direct.Direct.__call__, lambda op, *arguments, **keywords: op.function(*arguments, **keywords)

        with fastgen.use_backend("triton"), torch.no_grad():
            for name, call in calls().items():
                call()
                before = launches.value
                call()
                count = launches.value - before

                best = {"direct": float("inf"), "dispatch": float("inf")}
                for _ in range(rounds):
                    for way, method in (("direct", own), ("dispatch", ordinary)):
                        direct.Direct.__call__ = method
                        best[way] = min(best[way], seconds(call, times))
                direct.Direct.__call__ = own
                found[name] = {way: best[way] * 1e6 for way in best} | {"launches": count}
        x = torch.ones(16)
        found["torch.add"] = min(seconds(lambda: torch.add(x, x), times) for _ in range(rounds)) * 1e6
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="each call a few times")
    torch.set_num_threads(1)
    print(json.dumps(measure(*((2, 2) if parser.parse_args().tiny else (100, 20)))))


if __name__ == "__main__":
    sys.exit(main())
