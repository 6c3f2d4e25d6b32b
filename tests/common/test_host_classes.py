"""Inheritance from the classes of a library that is imported later."""

import sys
from collections import OrderedDict
from types import ModuleType

import pytest

from cdetr_fast.common import host_classes


class Host:
    def greet(self):
        return "host"

    def only_there(self):
        return type(self).__name__


class HostOutput(OrderedDict):
    pass


class Ours:
    def greet(self):
        return "ours"


class _Ordered(OrderedDict):
    pass


class OurOutput(_Ordered):
    pass


def test_what_a_class_has_itself_takes_precedence():
    class Heir(Ours):
        pass

    class Child(Heir):
        pass

    heir, child = Heir(), Child()
    host_classes.add_base(Heir, Host)
    host_classes.add_base(Heir, Host)
    assert Heir.__bases__ == (Ours, Host)
    assert isinstance(child, Host)
    assert (heir.greet(), child.only_there()) == ("ours", "Child")


def test_a_base_of_both_stays_one():
    output = OurOutput(a=1)
    host_classes.add_base(OurOutput, HostOutput)
    assert isinstance(output, HostOutput)
    assert dict(output) == {"a": 1}


@pytest.fixture
def library(monkeypatch):
    """A library that is not imported yet, and the module that joins it."""
    calls = []
    joining = ModuleType("joining")
    joining.inherit = lambda: calls.append(1) or len(calls) == 2
    monkeypatch.setitem(sys.modules, "joining", joining)
    monkeypatch.setattr(host_classes, "_MODULES", {"a_library": "joining"})
    return calls


def test_asked_only_when_imported_and_until_done(library, monkeypatch):
    host_classes.inherit_from_hosts()
    assert library == []
    monkeypatch.setitem(sys.modules, "a_library", ModuleType("a_library"))
    for _ in range(4):
        host_classes.inherit_from_hosts()
    assert len(library) == 2
