"""A profiled cell behaves in a real kernel as it would without the magic: eight behaviours."""

from __future__ import annotations

import re

CELL_FRAME = re.compile(r"^Cell In\[(\d+)\], line (\d+)(.*)$", re.MULTILINE)

JIT = '''
import inspect

class jit:
    """Reads its function's source when the def statement runs, as triton.jit does."""

    def __init__(self, function):
        self.lines, self.first_line = inspect.getsourcelines(function)

@jit
def add_kernel(x_ptr, BLOCK: int):
    return x_ptr + BLOCK  # read me

def helper(x):
    return x + 1  # and me

class Pair:
    def first(self):
        return 1
'''

READ_SOURCES = """
def source_of(it):
    try:
        return inspect.getsource(it)
    except (OSError, TypeError) as error:
        return f"{type(error).__name__}: {error}"

print(add_kernel.lines, add_kernel.first_line, source_of(helper), source_of(Pair), source_of(Pair.first))
"""


def plain_and_profiled(kernel, body, line=""):
    """The same cell without and with the magic; a comment stands for the magic's line, so that lines agree."""
    return kernel.run(f"# no magic\n{body}"), kernel.run(f"%%agnitra_profile {line}\n{body}")


def test_parity_of_the_value(kernel):
    plain, profiled = plain_and_profiled(kernel, "a = 20\na * 2 + 2")
    assert (profiled.status, profiled.values) == (plain.status, plain.values) == ("ok", ["42"])


def test_parity_of_underscore(kernel):
    kernel.run("%%agnitra_profile\n[1, 2, 3]")
    assert kernel.run("_").values == ["[1, 2, 3]"]
    profiled = kernel.run("%%agnitra_profile\n'by number'")
    assert kernel.run(f"_{profiled.execution_count}").values == ["'by number'"]
    kernel.run("%%agnitra_profile\nno_value = 1")
    assert kernel.run("_").values == ["'by number'"]


def test_parity_of_the_semicolon(kernel):
    for end in (";", ";  # quiet"):
        plain, profiled = plain_and_profiled(kernel, f"b = 5\nb + 1{end}")
        assert (profiled.status, profiled.values) == (plain.status, plain.values) == ("ok", [])
        assert len(profiled.cards) == 1


def test_parity_of_the_error_status(kernel):
    for body in (
        "raise LookupError('gone')",
        "import sys\nsys.exit(3)",
        "x = = 1",
        "class Odd(Exception): ...\nraise Odd",
    ):
        plain, profiled = plain_and_profiled(kernel, body)
        assert profiled.status == plain.status == "error"
        assert [name for name, _ in profiled.errors] == [name for name, _ in plain.errors]
    plain, profiled = plain_and_profiled(kernel, "raise LookupError('gone')")
    assert profiled.errors == plain.errors == [("LookupError", "gone")]


def test_parity_of_the_traceback_line(kernel):
    plain, profiled = plain_and_profiled(
        kernel, "\nimport math\ndef halve(n):\n    return 1 / n\n\nhalve(0)", "--name n"
    )
    magic, *frames = CELL_FRAME.findall(profiled.traceback)
    assert magic[1] == "1"
    # Line 7 and 5 of the cell as the user sees it, with the magic on line 1, under the cell's own number.
    assert [frame[1:] for frame in frames] == [frame[1:] for frame in CELL_FRAME.findall(plain.traceback)]
    assert [frame[:2] for frame in frames] == [(str(profiled.execution_count), line) for line in ("7", "5")]
    assert profiled.traceback.count("ZeroDivisionError: division by zero") == 1
    assert "return 1 / n" in profiled.traceback
    assert "agnitra_lab" not in profiled.traceback


def test_parity_of_getsource(kernel):
    plain = kernel.run(f"# no magic{JIT}{READ_SOURCES}")
    kernel.run("del jit, add_kernel, helper, Pair")
    profiled = kernel.run(f"%%agnitra_profile{JIT}{READ_SOURCES}")
    assert "x_ptr + BLOCK  # read me" in profiled.stdout and "return x + 1  # and me" in profiled.stdout
    assert profiled.stdout == plain.stdout
    # The source outlives the cell.
    assert "# and me" in kernel.run("print(inspect.getsource(helper))").stdout


def test_parity_of_nested_magics(kernel):
    body = "%time n = sum(range(10))\n%timeit -n1 -r1 n\nlines = !echo from the shell\n!echo printed\n(n, lines[0])"
    plain, profiled = plain_and_profiled(kernel, body)
    assert profiled.values == plain.values == ["(45, 'from the shell')"]
    for text in ("Wall time", "per loop", "printed"):
        assert text in profiled.stdout and text in plain.stdout
    timed = kernel.run("%%time\n%%agnitra_profile\nprint('inside')\n6 * 7")
    assert timed.values == ["42"] and "inside" in timed.stdout and "Wall time" in timed.stdout
    # The line counts as the whole cell does, whatever is above the body.
    failed = kernel.run("%%time\n%%agnitra_profile --name nested\n\n1 / 0")
    assert CELL_FRAME.findall(failed.traceback)[-1][:2] == (str(failed.execution_count), "4")
    kept = kernel.run("%%capture kept\n%%agnitra_profile\nprint('inside')\n6 * 7")
    assert kept.kinds == []
    assert kernel.run("kept.stdout, len(kept.outputs)").values == ["('inside\\n', 2)"]  # the card and the value
    inner = kernel.run("%%agnitra_profile\n%%time\n6 * 7")
    assert inner.values == ["42"] and "Wall time" in inner.stdout and len(inner.cards) == 1


def test_parity_of_an_interrupt(kernel):
    body = "import time, torch\ny = torch.ones(8) + 1\nprint('started', flush=True)\ntime.sleep(300)\nis_reached = True"
    reply = kernel.run(f"%%agnitra_profile\n{body}", when="started", then=kernel.interrupt)
    assert (reply.status, reply.errors) == ("error", [("KeyboardInterrupt", "")])
    assert reply.kinds == ["stream", "display_data", "error"]  # the card first, then the user's traceback
    assert "The code was interrupted" in reply.cards[0]["text/plain"]
    # It arrives in the sleep or, at the earliest, while print waits for its flush.
    assert CELL_FRAME.findall(reply.traceback)[-1][1] in ("4", "5") and "agnitra_lab" not in reply.traceback
    assert kernel.run("'is_reached' in dir()").values == ["False"]
    assert kernel.run("agnitra_telemetry.record.bottleneck is not None").values == ["True"]
    again = kernel.run("%%agnitra_profile\ny + 1\n'usable'")
    assert (again.status, again.values) == ("ok", ["'usable'"])
    assert kernel.run("[e.op for e in agnitra_telemetry.record.events if e.op == 'aten::add']").values == [
        "['aten::add']"
    ]


def test_the_card_is_one_display_message_with_html_and_text(kernel):
    reply = kernel.run("%%agnitra_profile --name one\npass")
    assert [set(content["data"]) for content in reply.of("display_data")] == [{"text/html", "text/plain"}]


def test_an_expected_failure_is_one_error_message_of_one_line(kernel):
    reply = kernel.run("%agnitra_optimize no_such_model x")
    assert reply.status == "error"
    assert reply.traceback.count("\n") == 0
    assert reply.traceback.startswith("UsageError: 'no_such_model' cannot be evaluated: NameError")


def test_tab_completes_the_options_of_a_magic_and_nothing_else(kernel):
    assert kernel.complete("%%agnitra_profile --") == [
        "--artifacts", "--max-events", "--memory", "--name", "--out", "--repeat", "--trace", "--workload",
    ]  # fmt: skip
    assert kernel.complete("%agnitra_optimize model x --b") == ["--budget"]
    assert kernel.complete("result = %agnitra_optimize model x --suggest pre") == ["preset"]


def test_tab_outside_the_magics_is_left_to_the_kernel(kernel):
    kernel.run("a_long_variable_name = 1")
    assert "a_long_variable_name" in kernel.complete("a_long_vari")
    assert "a_long_variable_name" in kernel.complete("%agnitra_optimize a_long_vari")
