"""What a call past Dynamo's guards must notice, whether the model's dictionaries are watched or read."""

from __future__ import annotations

import gc
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

from agnitra_lab.patch import dict_watch
from agnitra_lab.patch.dict_watch import DictWatch
from agnitra_lab.patch.liveness import Liveness, Surroundings


class Settings:
    def __init__(self):
        self.eps = 1e-5
        self.rope = {"theta": 1e4, "factors": [1.0, 2.0]}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.config = Settings()
        self.options = types.SimpleNamespace(is_causal=True)
        self.sizes = [1, [2, 3]]
        self.tables = {"cos": torch.ones(3)}
        self.gain = 2.0


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=["watched", "read"])
def model(request, monkeypatch):
    if request.param == "read":
        monkeypatch.setattr(dict_watch._generations, "watcher", lambda: None)
    elif dict_watch._generations.watcher() is None:
        pytest.skip("this interpreter does not say when a dictionary is written to")
    return Model()


def replace_rope(model):
    model.config.rope = dict(model.config.rope)


CHANGES = {
    "attribute": lambda m: setattr(m, "gain", 3.0),
    "new attribute": lambda m: setattr(m, "bias", None),
    "attribute gone": lambda m: delattr(m, "gain"),
    "attribute of a child": lambda m: setattr(m.inner[1], "inplace", True),
    "setting": lambda m: setattr(m.config, "eps", 1e-6),
    "new setting": lambda m: setattr(m.config, "other", 1),
    "setting of a namespace": lambda m: setattr(m.options, "is_causal", False),
    "other configuration": lambda m: setattr(m, "config", Settings()),
    "entry": lambda m: m.config.rope.update(theta=1e5),
    "entry gone": lambda m: m.config.rope.pop("theta"),
    "equal dictionary": replace_rope,
    "item": lambda m: m.sizes.append(4),
    "item of an inner list": lambda m: m.sizes[1].append(4),
    "item in a setting": lambda m: m.config.rope["factors"].append(4.0),
    "equal list": lambda m: setattr(m, "sizes", [1, [2, 3]]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_settings_is_noticed_at_every_call_from_then_on(model, change):
    liveness = Liveness(model)
    assert [liveness.difference() for _ in range(3)] == [None] * 3
    change(model)
    assert [liveness.difference() for _ in range(3)] == ["attributes changed"] * 3


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.inner[0], "weight", nn.Parameter(m.inner[0].weight.detach())),
        lambda m: m.inner[0]._parameters.update(bias=nn.Parameter(torch.zeros(4))),
        lambda m: m.tables.update(cos=torch.ones(3)),
        lambda m: m.inner.__setitem__(1, nn.ReLU()),
    ],
    ids=["parameter", "parameter by its table", "tensor in a dictionary", "module"],
)
def test_another_tensor_or_module_is_noticed_at_every_call_from_then_on(model, change):
    liveness = Liveness(model)
    assert liveness.difference() is None
    change(model)
    assert [liveness.difference() for _ in range(2)] == ["weights changed"] * 2


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_is_noticed_for_as_long_as_it_is_there(model, register):
    surroundings = Surroundings(model)
    assert [surroundings.difference() for _ in range(2)] == [None] * 2
    handle = getattr(model.inner[0], register)(lambda *given: None)
    assert [surroundings.difference() for _ in range(2)] == ["hooks changed"] * 2
    handle.remove()
    assert surroundings.difference() is None
    handle = getattr(nn.modules.module, register.replace("register", "register_module"))(lambda *given: None)
    assert surroundings.difference() == "hooks changed"
    handle.remove()


def test_what_is_written_and_put_back_is_no_difference(model):
    liveness = Liveness(model)
    assert liveness.difference() is None
    model.gain, model.config.eps = 3.0, 1.0
    model.gain, model.config.eps = 2.0, 1e-5
    assert liveness.difference() is None


def test_a_logger_or_a_lock_among_the_attributes_is_no_setting(model):
    import logging

    model.log = logging.getLogger("agnitra.test")
    liveness = Liveness(model)
    model.log.setLevel(10)
    logging.getLogger("agnitra.another")
    assert liveness.difference() is None


def test_a_configuration_that_holds_itself_is_read_once(model):
    model.config.owner = model.config
    model.config.rope["model"] = model
    assert Liveness(model).difference() is None


def test_two_watches_of_one_dictionary_end_one_after_the_other():
    table = {"a": 1}
    first, second = DictWatch([table]), DictWatch([table])
    if dict_watch._generations.watcher() is None:
        assert first.may_be_written() and second.may_be_written()
        return
    for watch in (first, second):
        assert watch.may_be_written()
        watch.settle()
        assert not watch.may_be_written()
    del first, watch
    gc.collect()
    table["a"] = 2
    assert second.may_be_written()
    del second
    gc.collect()
    assert id(table) not in dict_watch._num_watching


def test_a_write_while_the_dictionaries_are_read_is_read_the_next_time():
    table = {"a": 1}
    watch = DictWatch([table])
    assert watch.may_be_written()
    table["a"] = 2
    watch.settle()
    assert watch.may_be_written()


def test_an_error_on_its_way_survives_the_end_of_a_watched_model():
    def fail():
        model = Model()
        liveness = Liveness(model)
        assert liveness.difference() is None
        raise ValueError("the user's own")

    with pytest.raises(ValueError, match="the user's own"):
        fail()
    gc.collect()
    assert not dict_watch._num_watching


def test_a_process_that_ends_with_watched_models_ends_in_silence():
    code = (
        "import torch; from torch import nn; from agnitra_lab.patch.liveness import Liveness\n"
        "model = nn.Sequential(nn.Linear(2, 2)); model.me = model; kept = [Liveness(model), Liveness(model)]\n"
        "kept.append(kept); model.gain = 2.0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
