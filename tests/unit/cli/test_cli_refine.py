"""`agnitra refine`: a search on a recording from the shell, gone on with from its ledger, and its refusals."""

import json

import pytest

from agnitra_lab.cli import main
from agnitra_lab.contracts.search import SearchResult
from agnitra_lab.refine import replay

TEMPLATE = "swiglu"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["agnitra", "refine", *arguments])
    return main(exits=False)


def test_a_recorded_search_prints_each_trial_the_trust_and_the_best(monkeypatch, capsys) -> None:
    assert run(monkeypatch, TEMPLATE, "--budget", "5", "--on", "recorded") == 0
    printed = capsys.readouterr().out
    assert "5 of" in printed and "trust" in printed and "above the recorded optimum" in printed


def test_json_is_the_contract_and_a_ledger_is_gone_on_with(monkeypatch, capsys, tmp_path) -> None:
    ledger = str(tmp_path / "ledger.jsonl")
    assert run(monkeypatch, TEMPLATE, "--budget", "3", "--json", "--ledger", ledger, "--on", "recorded") == 0
    first = SearchResult.from_json(capsys.readouterr().out)
    assert run(monkeypatch, TEMPLATE, "--budget", "6", "--json", "--ledger", ledger, "--on", "recorded") == 0
    second = SearchResult.from_json(capsys.readouterr().out)
    assert second.trials[:3] == first.trials and len(second.trials) == 6
    assert second.measured_on.startswith("recorded: ")


@pytest.mark.parametrize("sampler", ["portfolio", "reinforce", "coordinate", "random"])
def test_every_sampler_can_be_named(monkeypatch, capsys, sampler: str) -> None:
    arguments = ("--sampler", sampler, "--budget", "2", "--json", "--cold", "--on", "recorded")
    assert run(monkeypatch, TEMPLATE, *arguments) == 0
    assert json.loads(capsys.readouterr().out)["sampler"] == sampler


def test_the_samplers_are_listed_with_their_ranks(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "--list") == 0
    assert "portfolio" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "Missing argument"),
        (("conv9d", "--on", "recorded"), 2, "No recorded landscape"),
        ((TEMPLATE, "--sampler", "ppo"), 2, "There is no sampler 'ppo'"),
        ((TEMPLATE, "--shape", "wide"), 2, "ROWSxCOLUMNS"),
        ((TEMPLATE, "--shape", "0x4"), 2, "at least 1"),
        ((TEMPLATE, "--shape", "3x7", "--on", "recorded"), 2, "The nearest recording is of"),
        ((TEMPLATE, "--budget", "0"), 2, "--budget"),
        ((TEMPLATE, "--seconds", "0"), 2, "--seconds"),
    ],
)
def test_a_wrong_argument_is_one_line_with_what_to_do(monkeypatch, capsys, arguments, code, message) -> None:
    assert run(monkeypatch, *arguments) == code
    printed = capsys.readouterr().err
    assert message in printed and len(printed.strip().splitlines()) == 1


def test_a_foreign_ledger_is_refused_and_left_as_it_is(monkeypatch, capsys, tmp_path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine\n")
    assert run(monkeypatch, TEMPLATE, "--ledger", str(path), "--on", "recorded") == 2
    assert "belongs to another search" in capsys.readouterr().err
    assert path.read_text() == "mine\n"


def test_a_gpu_that_is_not_there_is_exit_code_3(monkeypatch, capsys) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert run(monkeypatch, TEMPLATE, "--shape", "4096x5632", "--on", "gpu") == 3
    assert "--on recorded" in capsys.readouterr().err


def test_the_template_of_these_tests_was_recorded() -> None:
    assert TEMPLATE in replay.recorded()
