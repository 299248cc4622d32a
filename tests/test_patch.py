"""Replacing functions and putting them back."""

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
    with Patch([(Derived, "f", adds(1))]):
        assert Derived().f() == 2 and Base().f() == 1
        with Patch([(Derived, "f", adds(10))]):
            assert Derived().f() == 11
        assert Derived().f() == 2
    assert Derived().f() == 1 and "f" not in vars(Derived)


def test_patches_are_undone_in_any_order():
    own = Base.__dict__["f"]
    first, second = Patch([(Base, "f", adds(1))]), Patch([(Base, "f", adds(10))])
    first.unpatch()
    assert Base().f() == 11
    second.unpatch()
    second.unpatch()
    assert Base.__dict__["f"] is own


def test_an_instance_is_patched_alone():
    one, other = Base(), Base()
    with Patch([(one, "f", lambda original: lambda: original() + 5)]):
        assert one.f() == 6 and other.f() == 1
    assert one.f() == 1 and not vars(one)


def test_nothing_stays_where_a_patch_fails_half_way():
    with pytest.raises(AttributeError):
        Patch([(Base, "f", adds(1)), (Base, "missing", adds(1))])
    assert Base().f() == 1
