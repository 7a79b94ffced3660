"""Recording a landscape with processes that do as they are told: failures, crashes, limits, going on."""

from pathlib import Path

import pytest
from landscape_fake_jobs import us_of

from agnitra_lab.contracts.kernel import Site
from agnitra_lab.errors import AgnitraError, TemplateError, UsageError
from agnitra_lab.generate.defaults import default_config
from agnitra_lab.generate.kernels import space_of
from agnitra_lab.loop import compilers, landscape_record
from agnitra_lab.loop.landscape_grids import PLAN, wide_space
from agnitra_lab.loop.landscape_record import OutOfTimeError, RecordSettings, file_name, record
from agnitra_lab.refine.landscape_pack import pack
from agnitra_lab.refine.landscape_recording import read
from agnitra_lab.refine.replay import Landscape

SITE = Site("rms_norm", (64, 512), "bfloat16")
JOBS = Path(__file__).parent / "landscape_fake_jobs.py"


@pytest.fixture(autouse=True)
def _fake_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landscape_record, "_JOBS", str(JOBS))
    monkeypatch.setattr(compilers, "_JOBS", str(JOBS))


def settings(folder: Path, **more: object) -> RecordSettings:
    given = {
        "out": folder / "out", "device": "cuda", "limit_s": 300.0, "num_processes": 1, "is_resumed": False,
        "cache": folder / "cache", "command": "a test",
    }  # fmt: skip
    return RecordSettings(**(given | more))  # type: ignore[arg-type]


def test_every_config_is_measured_or_failed_with_its_class_whatever_happens_to_the_process(tmp_path: Path) -> None:
    events: list[str] = []
    (found,) = record([SITE], settings(tmp_path), events.append)
    assert found.is_done and found.num_unreadable == 0
    assert sorted({*found.ready, *found.failures}) == list(range(len(wide_space(SITE).configs)))
    for config, (failure, detail) in found.failures.items():
        params = found.params_of(config)
        wanted = {32: "compile", 16: "wrong", 8: "launch"}[params["ROWS_PER_PROGRAM"]]
        assert failure == wanted, detail
    assert any("crash at" in event for event in events)
    for config in found.ready:
        is_hopeless = found.params_of(config)["num_warps"] == 1
        assert len(found.samples[config]) == (1 if is_hopeless else 7)
        assert found.median_us(config) == us_of(found.params_of(config))
    assert len(found.again) == 32 and found.baselines == {"eager": [500.0] * 5}

    landscape = Landscape(pack(found))
    best = min(us_of(config.params) for config in landscape.space.configs if landscape.failure_of(config) is None)
    assert us_of(landscape.optimum.params) == best
    assert landscape.compile_s(landscape.optimum) == 0.25


def test_a_recording_that_the_limit_stopped_goes_on_and_measures_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*given: object) -> None:
        raise OutOfTimeError

    with monkeypatch.context() as patched:
        patched.setattr(landscape_record._Sweep, "_rounds", stop)
        events: list[str] = []
        (stopped,) = record([SITE], settings(tmp_path, most_configs=12), events.append)
    assert not stopped.is_done and stopped.ready and not stopped.again
    assert "stopped at the limit" in events[-1]

    with pytest.raises(UsageError, match="already"):
        record([SITE], settings(tmp_path, most_configs=12), events.append)
    with pytest.raises(UsageError, match="another configs"):
        record([SITE], settings(tmp_path, is_resumed=True, most_configs=11), events.append)

    (found,) = record([SITE], settings(tmp_path, is_resumed=True, most_configs=12), events.append)
    assert found.is_done
    assert all(list(rounds) == sorted(set(rounds)) for rounds in found.samples.values())
    text = (tmp_path / "out" / f"{file_name(SITE)}.jsonl").read_text()
    assert text.count('"kind":"ready"') == len(found.ready)
    assert text.count('"kind":"header"') == 1


def test_a_fault_around_the_compiler_stops_the_recording_and_is_no_configs_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken_jobs.py"
    broken.write_text(f"import sys\nsys.path.insert(0, {str(JOBS.parent)!r})\nfrom landscape_fake_jobs import *\n"
                      "from landscape_fake_jobs import fail_around as compile_config\n")  # fmt: skip
    monkeypatch.setattr(compilers, "_JOBS", str(broken))
    with pytest.raises(AgnitraError, match="no compiler here"):
        record([SITE], settings(tmp_path, most_configs=3), lambda line: None)
    assert read(tmp_path / "out" / f"{file_name(SITE)}.jsonl").failures == {}


SITES = [site for sites in PLAN.values() for site in sites]


@pytest.mark.parametrize("site", SITES, ids=lambda site: site.key())
def test_a_wide_grid_has_500_to_3000_configs_each_once_and_the_rule_of_thumb_among_them(site: Site) -> None:
    keys = [config.key() for config in wide_space(site).configs]
    assert 500 <= len(keys) <= 3000
    assert len(set(keys)) == len(keys)
    assert default_config(site.template, site.shape, site.dtype).key() in keys
    everyday = {config.key() for config in space_of(site).configs}
    assert len(everyday & set(keys)) >= 0.9 * len(everyday)


@pytest.mark.parametrize("site", [Site("conv9d", (4, 4), "bfloat16"), Site("rms_norm", (), "bfloat16")])
def test_a_site_without_a_wide_grid_is_refused(site: Site) -> None:
    with pytest.raises(TemplateError):
        wide_space(site)
