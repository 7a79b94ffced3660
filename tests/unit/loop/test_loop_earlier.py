"""What a finished run leaves to the next one, and that no record is believed further than it goes."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from agnitra_lab.contracts.device import DeviceInfo
from agnitra_lab.contracts.kernel import Launch, Site, TensorLayout
from agnitra_lab.contracts.measurement import CandidateResult, Comparison, Equivalence, Latency, Ratio
from agnitra_lab.contracts.workload import Workload
from agnitra_lab.loop.chooser import Chooser
from agnitra_lab.loop.earlier import Earlier, StaleRecordError
from agnitra_lab.loop.settings import Settings
from agnitra_lab.loop.site_survey import SiteSurvey
from agnitra_lab.patch.candidates import Candidate, Plan
from agnitra_lab.profiler import capture, graphs

H200 = DeviceInfo(type="cuda", name="NVIDIA H200", torch_version="2.11.0", triton_version="3.6.0")
NORM, GATE = Site("rms_norm", (4, 8), "bfloat16"), Site("swiglu", (4, 16), "bfloat16")
LAYOUT = TensorLayout((4, 8), (8, 1), 0, "bfloat16")
LAUNCHES = (
    Launch(NORM, (LAYOUT, (LAYOUT, None)), (("eps", 1e-5), ("mode", "fast"))),
    Launch(GATE, (LAYOUT, torch.bfloat16), ()),
)
FOUND = SiteSurvey(frozenset({"rms_norm", "swiglu"}), (NORM, GATE), frozenset({GATE}), LAUNCHES)
OURS = Candidate("agnitra", "default", ("rms_norm", "swiglu", "cuda_graph"))
LESS = Candidate("agnitra-rms_norm", "default", ("swiglu", "cuda_graph"))
PLAIN = Candidate("torch.compile", "default", ("cuda_graph",))


def result_of(name, latency_ms, status="kept"):
    def latency(value):
        return Latency(
            latency_ms_p50=value, latency_ms_p20=value * 0.99, latency_ms_p80=value * 1.01, num_samples=9,
            device_ms_p50=value * 0.9,
        )  # fmt: skip

    ratio = Ratio(median=10 / latency_ms, low=9.9 / latency_ms, high=10.1 / latency_ms)
    equivalence = Equivalence(
        is_equivalent=True, match_share=1.0, required_share=0.999, rtol=1e-4, num_seeds=3, num_elements=1,
        max_abs_error=0.0, error_vs_fp64=None, baseline_error_vs_fp64=None, error_ratio=None,
    )  # fmt: skip
    compared = Comparison(
        workload="w", baseline="eager", candidate=name, baseline_latency=latency(10.0),
        candidate_latency=latency(latency_ms), speedup=ratio, noise=Ratio(median=1, low=1, high=1),
        baseline_items_per_second=1, candidate_items_per_second=1, item_unit="calls", equivalence=equivalence,
        verdict="faster",
    )  # fmt: skip
    return CandidateResult(name=name, status=status, reason="", compile_s=0.1, comparison=compared)


@pytest.fixture
def workload():
    return Workload("net", nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval(), (torch.zeros(2, 8),))


@pytest.fixture
def opened(tmp_path, workload):
    def open_again(**settings):
        return Earlier(workload, Settings(tuned_folder=tmp_path, **settings), H200)

    return open_again


def patch_of(name, graph_sha256):
    return SimpleNamespace(name=name, graph_sha256=graph_sha256)


def leave(record, *, less_ms=2.0, run_id="first", winner="agnitra"):
    record.check(patch_of("agnitra", "graph"))
    tried = {"agnitra": (OURS, 12.0), "agnitra-rms_norm": (LESS, 6.0)}
    results = [result_of("agnitra", 1.0), result_of("agnitra-rms_norm", less_ms, "rejected")]
    record.keep(run_id, FOUND, tried, results, winner)


def files(tmp_path):
    return sorted(path.suffix for path in (tmp_path / "runs").iterdir())


def test_the_first_run_knows_nothing(opened):
    record = opened()
    assert (record.run_id, record.surveyed(), record.winner(), record.cost_s(OURS)) == (None, None, None, None)
    assert record.most_s() == 0.0


def test_sites_launches_winner_and_costs_come_back_as_they_were(opened):
    leave(opened())
    record = opened()
    assert record.run_id == "first"
    # A launch with a value that JSON does not keep is left out: it is compiled where it runs.
    assert record.surveyed() == SiteSurvey(FOUND.findable, FOUND.sites, FOUND.standing, LAUNCHES[:1])
    assert record.winner() == OURS
    assert (record.cost_s(OURS), record.cost_s(PLAIN), record.most_s()) == (12.0, None, 12.0)


def test_a_run_that_is_not_to_start_warm_knows_nothing_and_leaves_its_own(opened):
    leave(opened())
    assert opened(is_warm=False).winner() is None
    leave(opened(is_warm=False), run_id="second")
    assert opened().run_id == "second"


def test_a_clear_loser_is_not_tried_again_where_the_winner_does_as_well_as_it_did(opened):
    leave(opened())
    record = opened()
    assert record.why_not(LESS, []) is None
    assert record.why_not(LESS, [result_of("agnitra", 1.3)]) is None
    reason = record.why_not(LESS, [result_of("agnitra", 1.05)])
    assert reason == "2.00 times the time of agnitra, measured in run first; not tried again"
    assert record.why_not(OURS, [result_of("agnitra", 1.0)]) is None


def test_who_lost_by_no_more_than_the_moment_may_have_made_is_tried_again(opened):
    leave(opened(), less_ms=1.04)
    assert opened().why_not(LESS, [result_of("agnitra", 1.0)]) is None


def test_a_candidate_of_the_same_name_with_other_changes_is_another(opened):
    leave(opened())
    other = Candidate(LESS.name, "default", ("cuda_graph",))
    assert opened().why_not(other, [result_of("agnitra", 1.0)]) is None
    assert opened().cost_s(other) is None


def test_costs_are_those_without_warm_caches(opened):
    leave(opened())
    again = opened()
    again.keep("second", FOUND, {"agnitra": (OURS, 3.0)}, [result_of("agnitra", 1.0)], "agnitra")
    assert opened().cost_s(OURS) == 12.0
    assert opened().cost_s(LESS) == 6.0


def test_of_a_candidate_that_was_given_up_its_cost_is_known_unless_all_of_it_was(opened):
    given_up = CandidateResult(name="torch.compile", status="skipped", reason="given up after 40 s")
    opened().keep("first", FOUND, {"torch.compile": (PLAIN, 40.0)}, [given_up], None)
    assert opened().cost_s(PLAIN) == 40.0
    whole = result_of("torch.compile", 3.0)
    opened().keep("second", FOUND, {"torch.compile": (PLAIN, 50.0)}, [whole], "torch.compile")
    opened().keep("third", FOUND, {"torch.compile": (PLAIN, 30.0)}, [given_up], "torch.compile")
    assert opened().cost_s(PLAIN) == 50.0 and opened().winner() == PLAIN
    assert opened().why_not(LESS, [whole]) is None


def test_a_run_that_was_told_what_to_try_leaves_the_winner_as_it_was(opened):
    leave(opened())
    told = opened(only="torch.compile")
    told.keep("second", FOUND, {"torch.compile": (PLAIN, 9.0)}, [result_of("torch.compile", 3.0)], "torch.compile")
    assert opened().winner() == OURS
    assert opened().cost_s(PLAIN) == 9.0


def test_another_graph_of_the_model_ends_the_record(opened):
    leave(opened())
    record = opened()
    record.check(patch_of("agnitra", "graph"))
    record.check(patch_of("torch.compile", "another"))
    with pytest.raises(StaleRecordError):
        record.check(patch_of("agnitra", "another"))
    record.forget()
    record.check(patch_of("agnitra", "another"))
    assert (record.surveyed(), record.winner()) == (None, None)


@pytest.mark.parametrize(
    "damage", [lambda text: text[:-9], lambda text: text.replace(b"12.0", b"13.0"), lambda text: b""]
)
def test_a_damaged_file_is_kept_aside_byte_for_byte_and_the_run_starts_cold(opened, tmp_path, damage):
    leave(opened())
    (path,) = (tmp_path / "runs").iterdir()
    path.write_bytes(damage(path.read_bytes()))
    damaged = path.read_bytes()
    assert opened().winner() is None
    leave(opened())
    assert files(tmp_path) == [".json", ".unreadable"]
    assert path.with_suffix(".unreadable").read_bytes() == damaged
    assert opened().winner() == OURS


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_record(workload, tmp_path):
    (tmp_path / "file").write_text("")
    record = Earlier(workload, Settings(tuned_folder=tmp_path / "file"), H200)
    leave(record)
    assert record.run_id is None


class Raising:
    """Says nothing about itself."""

    @property
    def __dict__(self):
        raise RuntimeError("planted")


def test_of_a_model_that_cannot_be_described_nothing_is_kept(workload, opened, tmp_path):
    workload.model.setting = Raising()
    leave(opened())
    assert list(tmp_path.iterdir()) == []


def test_on_a_cpu_nothing_is_kept(workload, tmp_path):
    leave(Earlier(workload, Settings(tuned_folder=tmp_path), H200.model_copy(update={"type": "cpu"})))
    assert list(tmp_path.iterdir()) == []


def test_a_model_whose_graph_is_known_is_profiled_without_being_traced(opened, workload, monkeypatch):
    first = capture.profile(workload, repeat=1, num_warmup=1)
    leave(opened())
    graphs.forget(workload.model)
    opened().remind()
    monkeypatch.setattr(graphs, "capture", lambda *given: pytest.fail("it was traced"))
    assert capture.profile(workload, repeat=1, num_warmup=1).graph == first.graph


def chosen(record, times_ms):
    built = []

    def build(candidate):
        built.append(candidate.name)
        changes = [SimpleNamespace(action=action) for action in candidate.changes]
        log = SimpleNamespace(compile_s=0.1, descriptors=changes, refusals=[])
        return SimpleNamespace(name=candidate.name, is_whole=True, log=lambda: log, discard=lambda: None)

    plan = Plan(("rms_norm", "swiglu"), "cuda")
    chooser = Chooser(
        plan, build, lambda name, patch: result_of(name, times_ms.get(name, 3.0)), budget_s=60.0, earlier=record
    )
    chooser.run()
    return chooser, built


def test_the_earlier_winner_is_tried_first_and_each_candidate_once(opened):
    record = opened()
    first, _ = chosen(record, {"agnitra-rms_norm": 1.0})
    record.keep("first", FOUND, first.tried, first.results, "agnitra-rms_norm")
    again, built = chosen(opened(), {"agnitra-rms_norm": 1.0})
    assert built[0] == "agnitra-rms_norm"
    assert len(built) == len(set(built))
    assert len({result.name for result in again.results}) == len(again.results)


def test_a_record_spares_what_lost_clearly_and_every_row_says_so(opened):
    record = opened()
    first, built = chosen(record, {"agnitra": 1.0})
    lost = [row.model_copy(update={"status": "rejected"}) if row.name != "agnitra" else row for row in first.results]
    record.keep("first", FOUND, first.tried, lost, "agnitra")
    again, few = chosen(opened(), {"agnitra": 1.0})
    assert few == ["agnitra"]
    assert len(built) > 2
    spared = [row for row in again.results if row.status == "skipped"]
    assert {row.name for row in spared if "in run first; not tried again" in row.reason} == set(built) - {"agnitra"}
