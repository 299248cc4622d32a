"""What `fastgen.drop_in.gaussian_diffusion.patch` takes over in other versions of the libraries than the installed one.

    python tools/known_code.py denoising-diffusion-pytorch==1.5.4 path/to/guided-diffusion …

For each it prints the methods that run on fastgen there, the fingerprints that are not in the tables yet, and whether the tests of
known code pass with it: the tables name a version only after that. With no arguments, it does so for the versions of
denoising-diffusion-pytorch in `VERSIONS`. pip downloads a package into a temporary folder; nothing is installed.
"""

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "denoising-diffusion-pytorch"
# 18 of these have been run, which the documentation of `gaussian_diffusion.patch` names; 1.5.0, 1.7.7, 1.8.0, 1.9.6, 1.11.1, 2.0.9,
# 2.1.1 and 2.3.0 have the same code as one of them, and have not.
VERSIONS = """
1.0.0 1.0.7 1.1.1 1.2.2 1.4.6 1.5.0 1.5.4 1.5.8 1.6.4 1.7.7 1.8.0 1.8.7 1.8.15 1.9.6 1.10.17 1.11.1
2.0.0 2.0.9 2.0.18 2.1.1 2.2.0 2.2.3 2.2.6 2.3.0 2.3.2 2.3.4
"""
# Old versions import these, and use them for nothing that is tested: modules in which every name is an empty class
UNUSED = ["pytorch_fid/__init__", "pytorch_fid/inception", "pytorch_fid/fid_score", "lion_pytorch"]
EMPTY = """
def __getattr__(name):
    if name[:2] == "__":
        raise AttributeError(name)
    return type(name, (), {})
"""
SHOW = """
import importlib, json, sys
from fastgen.drop_in import _denoising_diffusion_pytorch, _guided_diffusion
from fastgen.drop_in._source import fingerprint
from fastgen.drop_in.gaussian_diffusion import patch
kinds = [getattr(importlib.import_module(module), name) for module, name in json.loads(sys.argv[1])]
for kind in kinds:
    library = _guided_diffusion if hasattr(kind, "q_posterior_mean_variance") else _denoising_diffusion_pytorch
    print(" ", patch(kind))
    for name, method in library.METHODS.items():
        for place in (c for c in kind.__mro__ if name in vars(c)):
            digits = fingerprint(vars(place)[name])
            if digits not in method.known:
                print(f"    not known: {place.__name__}.{name} {digits}")
"""


def main(sources):
    failed = [source for source in sources if not compare(source)]
    print("the tests fail with", *failed) if failed else print("the tests pass with all of these")
    return bool(failed)


def compare(source):
    """Whether the tests pass with the version or the folder `source`."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name in UNUSED:
            path = folder / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(EMPTY)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, folder, ROOT / "tests/stand_in")))}
        if source.startswith(f"{PACKAGE}=="):
            kinds = download(source, folder)
            chosen = "known_denoising or learned_gaussian or forgets"
        else:
            kinds, root = in_folder(Path(source).resolve())
            environment |= {"FASTGEN_GUIDED_DIFFUSION": str(root)}
            environment["PYTHONPATH"] += f"{os.pathsep}{root}"
            chosen = "make_real or forgets"
        print(source, flush=True)
        subprocess.run([sys.executable, "-c", SHOW, json.dumps(kinds)], env=environment, check=True, cwd=folder)
        tests = ROOT / "tests/test_drop_in_gaussian_diffusion.py"
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", str(tests), "-k", chosen],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        print(" ", run.stdout.strip().splitlines()[-1], flush=True)
        return run.returncode == 0


def download(requirement, folder):
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, requirement], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    module = f"{PACKAGE.replace('-', '_')}.{PACKAGE.replace('-', '_')}"
    return [(module, "GaussianDiffusion"), (f"{module}_1d", "GaussianDiffusion1D")]


def in_folder(root):
    (path,) = [p for p in root.glob("*/gaussian_diffusion.py") if (p.parent / "respace.py").exists()]
    package = path.parent.name
    return [(f"{package}.gaussian_diffusion", "GaussianDiffusion"), (f"{package}.respace", "SpacedDiffusion")], root


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or [f"{PACKAGE}=={version}" for version in VERSIONS.split()]))
