"""Replacing functions and putting them back."""

import logging

import pytest

from fastgen.drop_in._patch import Patch


class Base:
    def f(self):
        return 1


class Derived(Base):
    pass


def adds(number):
    return lambda original: lambda self: original(self) + number


def test_patches_nest_and_see_the_original():
    with Patch([(Derived, "f", adds(1))], "f"):
        assert Derived().f() == 2 and Base().f() == 1
        with Patch([(Derived, "f", adds(10))], "f"):
            assert Derived().f() == 11
        assert Derived().f() == 2
    assert Derived().f() == 1 and "f" not in vars(Derived)


def test_patches_are_undone_in_any_order():
    own = Base.__dict__["f"]
    first, second = Patch([(Base, "f", adds(1))], "f"), Patch([(Base, "f", adds(10))], "f")
    first.unpatch()
    assert Base().f() == 11
    second.unpatch()
    second.unpatch()
    assert Base.__dict__["f"] is own


def test_an_instance_is_patched_alone():
    one, other = Base(), Base()
    with Patch([(one, "f", lambda original: lambda: original() + 5)], "f"):
        assert one.f() == 6 and other.f() == 1
    assert one.f() == 1 and not vars(one)


def test_nothing_stays_where_a_patch_fails_half_way():
    with pytest.raises(AttributeError):
        Patch([(Base, "f", adds(1)), (Base, "missing", adds(1))], "f")
    assert Base().f() == 1


def test_a_patch_says_what_it_did(caplog):
    with (
        caplog.at_level(logging.INFO, "fastgen.drop_in"),
        Patch([(Base, "f", adds(1))], "methods of Base", {"Base.g": "no source"}) as p,
    ):
        assert p.covered == ("Base.f",) and p.skipped == {"Base.g": "no source"}
        assert caplog.messages == [repr(p)] == ["1 of 2 methods of Base run on fastgen; not g: no source"]
    with Patch([(Base(), "f", lambda original: original)], "methods of Base") as p:
        assert p.covered == ("Base.f",) and repr(p) == "1 of 1 methods of Base run on fastgen"


def test_a_replacement_that_someone_has_deleted():
    one = Base()
    patch = Patch([(one, name, lambda original: lambda: 7) for name in ("f", "__str__")], "two")
    del one.f
    patch.unpatch()
    patch.unpatch()
    assert one.f() == 1 and not vars(one)
