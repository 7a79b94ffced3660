"""A profiled cell behaves in a real kernel as it would without the magic: eight behaviours."""

from __future__ import annotations


def test_the_value_of_the_last_expression_is_the_value_of_the_cell(kernel):
    reply = kernel.run("%%agnitra_profile\na = 20\na * 2 + 2")
    assert (reply.status, reply.values) == ("ok", ["42"])


def test_underscore_holds_the_value(kernel):
    kernel.run("%%agnitra_profile\n[1, 2, 3]")
    assert kernel.run("_").values == ["[1, 2, 3]"]


def test_a_trailing_semicolon_hides_the_value_and_not_the_card(kernel):
    reply = kernel.run("%%agnitra_profile\nb = 5\nb + 1;")
    assert reply.status == "ok"
    assert reply.values == []
    assert len(reply.cards) == 1


def test_an_exception_gives_the_cell_the_status_error(kernel):
    reply = kernel.run("%%agnitra_profile\nraise LookupError('gone')")
    assert reply.status == "error"
    assert [(error["ename"], error["evalue"]) for error in reply.of("error")] == [("LookupError", "gone")]


def test_the_traceback_comes_once_and_counts_lines_as_the_cell_does(kernel):
    reply = kernel.run("%%agnitra_profile --name lines\n\nimport math\ndef halve(n):\n    return 1 / n\n\nhalve(0)")
    assert len(reply.of("error")) == 1
    assert reply.traceback.count("ZeroDivisionError: division by zero") == 1
    assert "return 1 / n" in reply.traceback
    # Line 5 and 7 of the cell as the user sees it, with the magic on line 1.
    assert ", line 5, in halve(n)" in reply.traceback
    assert ", line 7\n" in reply.traceback
    assert "profiling.py" not in reply.traceback and "magics.py" not in reply.traceback


def test_the_source_of_a_function_defined_in_the_cell_can_be_read(kernel):
    kernel.run("%%agnitra_profile\nimport inspect\ndef kernel_body(x):\n    return x + 1  # read me")
    reply = kernel.run("print(inspect.getsource(kernel_body))")
    assert reply.stdout == "def kernel_body(x):\n    return x + 1  # read me\n\n"


def test_magics_and_shell_commands_inside_the_cell_work(kernel):
    reply = kernel.run("%%agnitra_profile\n%time n = sum(range(10))\nlines = !echo from the shell\n(n, lines[0])")
    assert "Wall time" in reply.stdout
    assert reply.values == ["(45, 'from the shell')"]


def test_an_interrupt_stops_the_body_and_leaves_the_profiler_stopped(kernel):
    body = "%%agnitra_profile\nimport time\nprint('started', flush=True)\ntime.sleep(300)\nis_reached = True"
    reply = kernel.run(body, interrupt_on="started")
    assert reply.status == "error"
    assert [error["ename"] for error in reply.of("error")] == ["KeyboardInterrupt"]
    assert kernel.run("'is_reached' in dir()").values == ["False"]
    again = kernel.run("%%agnitra_profile\n1 + 1")
    assert again.values == ["2"]
    assert kernel.run("agnitra_telemetry.record.notes").values == ["()"]


def test_the_card_is_one_display_message_with_html_and_text(kernel):
    reply = kernel.run("%%agnitra_profile --name one\npass")
    assert [set(content["data"]) for content in reply.of("display_data")] == [{"text/html", "text/plain"}]


def test_an_expected_failure_is_one_error_message_of_one_line(kernel):
    reply = kernel.run("%agnitra_optimize no_such_model x")
    assert reply.status == "error"
    assert reply.traceback.count("\n") == 0
    assert reply.traceback.startswith("UsageError: 'no_such_model' cannot be evaluated: NameError")


def test_tab_completes_the_options_of_a_magic_and_nothing_else(kernel):
    assert kernel.complete("%%agnitra_profile --") == ["--artifacts", "--name", "--out", "--repeat", "--workload"]
    assert kernel.complete("%agnitra_optimize model x --b") == ["--budget"]
    assert kernel.complete("result = %agnitra_optimize model x --suggest pre") == ["preset"]


def test_tab_outside_the_magics_is_left_to_the_kernel(kernel):
    kernel.run("a_long_variable_name = 1")
    assert "a_long_variable_name" in kernel.complete("a_long_vari")
    assert "a_long_variable_name" in kernel.complete("%agnitra_optimize a_long_vari")
