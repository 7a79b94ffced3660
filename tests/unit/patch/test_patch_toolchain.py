"""The compiler is made ready beside other work, and a probe that was ended leaves no answer behind."""

from __future__ import annotations

import pytest
from torch._inductor import cpu_vec_isa

from agnitra_lab.patch import toolchain


@pytest.fixture
def unasked():
    toolchain._forget(cpu_vec_isa)
    yield
    toolchain._forget(cpu_vec_isa)


def test_the_answer_is_there_when_the_thread_has_ended(unasked):
    thread = toolchain.warm_up("cpu")
    thread.join(120)
    assert not thread.is_alive()
    assert cpu_vec_isa.valid_vec_isa_list.cache_info().currsize == bool(cpu_vec_isa.pick_vec_isa())


def test_a_probe_that_was_ended_is_made_again(unasked, monkeypatch):
    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", lambda *_: False)
    toolchain.warm_up("cpu").join(120)
    assert cpu_vec_isa.valid_vec_isa_list.cache_info().currsize == 0
    asked = []
    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", lambda *_: asked.append(1) or True)
    cpu_vec_isa.valid_vec_isa_list()
    assert asked


def test_other_devices_need_none():
    assert toolchain.warm_up("cuda") is None
