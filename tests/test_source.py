"""The fingerprint of a function's code: what changes it and what does not."""

import functools
import importlib.util
import itertools
import sys
import textwrap
import types

import pytest
import torch

from fastgen.drop_in._source import fingerprint, mark_replacement, replaced_by

TEXT = '''
import dataclasses
import torch

SCALE = 2
BOUNDS = (-1, 1)

@dataclasses.dataclass
class Output:
    value: object
    extra: object = None

    def first(self):
        return self.value

class Common:
    def __call__(self, x):
        return self.made(x)

class Wrapped(Common):
    LEAST = 1

    @staticmethod
    def add(x):
        return x + 1

    @classmethod
    def made(cls, x):
        return cls.add(x)

    @property
    def least(self):
        return self.LEAST

class Base:
    def f(self, x, t, noise=None):
        """What it does."""
        # how
        return helper(x, t) * SCALE + self.g(x)

    def out(self, x):
        return Output(x)

    def g(self, x):
        return Wrapped()(x).clamp(*BOUNDS)

    @torch.no_grad()
    def sample(self, x):
        return x + 1

def helper(a, t):
    return a[t]
'''
_count = itertools.count()


@pytest.fixture
def module(tmp_path):
    """Makes a module of its own package from TEXT, with changes."""
    names = []

    def make(*changes):
        text = textwrap.dedent(TEXT)
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        names.append(f"made_{next(_count)}")
        path = tmp_path / f"{names[-1]}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(names[-1], path)
        made = sys.modules[names[-1]] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
        return made

    yield make
    for name in names:
        del sys.modules[name]


@pytest.mark.parametrize(
    "old, new",
    [
        ("What it does.", "Something else."),
        ('        """What it does."""\n', ""),
        ("# how", "# otherwise"),
        ("t, noise=None", "t: int, noise: object = None"),
        ("class Base", "class Renamed"),
        ("def sample", "def other"),
    ],
)
def test_what_a_function_does_not_depend_on(module, old, new):
    changed = module((old, new))
    kind = changed.Renamed if new == "class Renamed" else changed.Base
    assert fingerprint(kind.f) == fingerprint(module().Base.f) is not None


@pytest.mark.parametrize(
    "old, new",
    [
        ("* SCALE +", "* SCALE -"),
        ("SCALE = 2", "SCALE = 3"),
        ("return a[t]", "return a[t].float()"),
        ("self.g(x)", "self.h(x)"),
        ("noise=None", "noise=0"),
        ("x, t, noise", "x, u, noise"),
        ("import torch\n", "import math as torch\nimport torch as other\n"),
    ],
)
def test_what_a_function_depends_on(module, old, new):
    name = "sample" if "import" in old else "f"
    changes = [(old, new)] + ([("@torch.no_grad()", "@other.no_grad()")] if name == "sample" else [])
    assert fingerprint(getattr(module(*changes).Base, name)) != fingerprint(getattr(module().Base, name))


def test_defaults_count_by_their_values(module):
    made = module()
    before = fingerprint(made.Base.f)
    made.Base.f.__defaults__ = (1,)
    assert fingerprint(made.Base.f) != before


def test_a_helper_that_another_one_has_replaced(module):
    made, other = module(), module()
    before = fingerprint(made.Base.f)
    made.helper = other.helper  # of another package: it counts by its name
    assert fingerprint(made.Base.f) != before


@pytest.mark.parametrize(
    "old, new",
    [
        ("(-1, 1)", "(-3, 3)"),
        ("return self.made(x)", "return 2 * self.made(x)"),  # of a base
        ("    LEAST = 1", "    LEAST = 2"),
        ("return x + 1\n\n    @classmethod", "return x + 2\n\n    @classmethod"),
        ("return cls.add(x)", "return -cls.add(x)"),
        ("return self.LEAST", "return -self.LEAST"),
    ],
)
def test_classes_and_constants_of_the_package_count(module, old, new):
    assert None is not fingerprint(module().Base.g) != fingerprint(module((old, new)).Base.g)


def test_a_descriptor_of_unknown_behaviour_in_a_class_of_the_package(module):
    made = module()
    made.Wrapped.least = functools.cached_property(lambda self: 1)
    assert fingerprint(made.Base.g) is None


@pytest.mark.parametrize("old, new", [("extra: object = None", "extra: object = 1"), ("return self.value", "return self.extra")])
def test_a_dataclass_counts_by_its_fields_and_its_own_functions(module, old, new):
    """Those that it has made of its fields have no source."""
    assert fingerprint(module((old, new)).Base.out) != fingerprint(module().Base.out) is not None


def test_helpers_in_another_module_of_the_package(module):
    made, other = module(("return helper(", "return own.helper(")), module(("return a[t]", "return -a[t]"))
    prints = []
    for helper in (made.helper, other.helper):
        own = types.ModuleType(made.__name__ + ".own")
        own.helper, made.own = helper, own
        helper.__module__ = made.__name__
        prints.append(fingerprint(made.Base.f))
    assert None not in prints and prints[0] != prints[1]


def test_a_progress_bar_is_the_same_in_a_notebook(module):
    made, prints = module(("return helper(", "return tqdm(")), []
    for where, name in (("tqdm.asyncio", "tqdm_asyncio"), ("tqdm.auto", "tqdm"), ("elsewhere", "tqdm")):
        made.tqdm = type(name, (), {"__module__": where})
        prints.append(fingerprint(made.Base.f))
    assert prints[0] == prints[1] != prints[2]


def test_a_function_that_is_given_other_code(module):
    made = module()
    before = fingerprint(made.Base.f)
    made.Base.f.__code__ = module(("* SCALE +", "* SCALE -")).Base.f.__code__  # as a notebook's autoreload does
    assert fingerprint(made.Base.f) != before


def test_another_decorator_counts(module):
    # on the same line of another file, where the code is the same
    assert fingerprint(module().Base.sample) != fingerprint(module(("@torch.no_grad()", "@torch.inference_mode()")).Base.sample)


def test_variables_of_a_function_around_are_not_known(module):
    made = module(
        ("def helper(a, t):", "def outer(n):\n    def inner(x):\n        return x + n\n    return inner\n\ndef helper(a, t):")
    )
    assert fingerprint(made.outer) is not None and fingerprint(made.outer(1)) is None


def test_wrappers(module):
    made = module()
    assert fingerprint(made.Base.sample) == fingerprint(module().Base.sample) is not None
    written = made.Base.sample
    made.Base.sample = functools.wraps(written)(lambda self, x: 2 * written(self, x))
    assert fingerprint(made.Base.sample) is None  # not that of what it wraps
    made.Base.f = torch.no_grad()(made.Base.f)  # which its source does not show
    assert fingerprint(made.Base.f) is None


def test_bound_methods_recursion_and_what_has_no_source(module):
    made = module(("return a[t]", "return helper(a, t - 1) if t else a[0]"))
    assert fingerprint(made.Base().f) == fingerprint(made.Base.f) is not None
    space = {}
    exec("def f(x):\n    return x", space)
    assert all(fingerprint(f) is None for f in (space["f"], len, lambda x: x, made.Base, functools.partial(made.Base.f)))


def test_the_mark_of_a_replacement_is_its_own():
    def original(x):
        return x

    def replacement(x):
        return x

    mark_replacement(replacement, original)
    wrapper = functools.wraps(replacement)(lambda x: replacement(x) + 1)  # to which wraps has copied the mark
    assert replaced_by(replacement) is original and replaced_by(wrapper) is None and replaced_by(original) is None
