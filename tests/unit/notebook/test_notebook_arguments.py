from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agnitra_lab.contracts.workload import Workload
from agnitra_lab.errors import UsageError
from agnitra_lab.notebook import arguments

EXPRESSIONS = ["model", "x", "make(1, 2)", "(x, mask)", "{'ids': ids}", "net.half()", "[a, b]", "'a b'", "-x"]


@pytest.mark.parametrize(
    ("line", "model", "inputs"),
    [
        ("model x", "model", "x"),
        ("model (x, mask)", "model", "(x, mask)"),
        ("model {'ids': ids, 'mask': mask}", "model", "{'ids': ids, 'mask': mask}"),
        ("build(a, b) x", "build(a, b)", "x"),
        ("model x + 1", "model", "x + 1"),
        ("workload", "workload", None),
        ("demo('bert', scale='tiny')", "demo('bert', scale='tiny')", None),
        ("demo:bert@tiny", "demo:bert@tiny", None),
    ],
)
def test_a_line_is_a_model_and_its_inputs(line, model, inputs):
    assert arguments.two_expressions(arguments.pieces_of(line)) == (model, inputs)


@pytest.mark.parametrize("line", ["", "model x y", "model (", "model in"])
def test_a_line_that_is_no_python_says_what_to_write(line):
    with pytest.raises(UsageError, match=r"%agnitra_optimize model inputs"):
        arguments.two_expressions(arguments.pieces_of(line))


@given(st.sampled_from(EXPRESSIONS), st.sampled_from(EXPRESSIONS), st.booleans())
def test_options_may_stand_before_or_after_the_expressions(model, inputs, is_before):
    option = "--name 'my model' --budget=5"
    line = f"{option} {model} {inputs}" if is_before else f"{model} {inputs} {option}"
    code, options = arguments.split_options(arguments.pieces_of(line))
    assert arguments.two_expressions(code) == (model, inputs)
    assert options == ["--name", "'my model'", "--budget=5"]


@given(st.text())
def test_cutting_a_line_loses_nothing_but_spaces(line):
    assert "".join("".join(arguments.pieces_of(line)).split()) == "".join(line.split())


def test_quotes_around_an_option_are_not_part_of_its_value(shell):
    parser = shell.ip.find_cell_magic("agnitra_profile").parser
    given_options = arguments.parse(parser, ["--name", '"two words"', "--out='a b'"], "%%agnitra_profile")
    assert (given_options.name, given_options.out) == ("two words", "a b")


def test_a_workload_is_a_variable_or_a_target(shell):
    shell.ok("from agnitra_lab import Workload\nmine = Workload('mine', len, ([1],))")
    assert arguments.workload_of(shell.ip, "mine") is shell["mine"]
    built = arguments.workload_of(shell.ip, "demo:bert@tiny")
    assert isinstance(built, Workload)
    assert built.items_per_call > 0


def test_what_is_no_workload_is_refused_by_its_type(shell):
    with pytest.raises(UsageError, match="'3' is a int"):
        arguments.workload_of(shell.ip, "3")
