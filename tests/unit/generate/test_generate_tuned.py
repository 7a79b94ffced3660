"""Findings of searches on disk: they come back on the same machine with the same kernel, and nowhere else."""

import json

import pytest

pytest.importorskip("triton")

from agnitra_lab.contracts.kernel import Site
from agnitra_lab.generate.kernels import space_of
from agnitra_lab.generate.tuned import TunedConfigs, bucket

SITE = Site("rms_norm", (4096, 2048), "bfloat16")
CONFIG = space_of(SITE).configs[-1]
VERSIONS = {"torch": "2.11.0", "triton": "3.6.0"}


@pytest.fixture
def folder(tmp_path):
    TunedConfigs(tmp_path, "NVIDIA H200", VERSIONS).add(SITE, CONFIG, 0.0207)
    return tmp_path


def test_a_finding_comes_back_in_the_next_run(folder):
    assert TunedConfigs(folder, "NVIDIA H200", VERSIONS).get(SITE) == CONFIG


@pytest.mark.parametrize(
    ("device", "versions"), [("NVIDIA H100", VERSIONS), ("NVIDIA H200", VERSIONS | {"triton": "3.7.0"})]
)
def test_another_device_or_version_searches_again(folder, device, versions):
    assert TunedConfigs(folder, device, versions).get(SITE) is None


def test_a_shape_of_the_same_bucket_takes_the_finding_where_it_is_valid(folder):
    found = TunedConfigs(folder, "NVIDIA H200", VERSIONS)
    assert bucket((3000, 2048)) == (4096, 2048)
    assert found.get(Site("rms_norm", (3000, 2048), "bfloat16")) == CONFIG
    assert found.get(Site("rms_norm", (3000, 2049), "bfloat16")) is None
    assert found.get(Site("rms_norm", (3000, 2048), "float32")) is None


def test_the_last_finding_of_a_site_counts(folder):
    other = space_of(SITE).configs[0]
    TunedConfigs(folder, "NVIDIA H200", VERSIONS).add(SITE, other, 0.02)
    assert TunedConfigs(folder, "NVIDIA H200", VERSIONS).get(SITE) == other


def test_a_rule_of_thumb_that_was_merely_measured_is_its_sites_own_and_not_searched(folder):
    merely = Site("rms_norm", (8, 2048), "bfloat16")
    config = space_of(merely).configs[0]
    TunedConfigs(folder, "NVIDIA H200", VERSIONS).add(merely, config, 0.004, is_searched=False)
    found = TunedConfigs(folder, "NVIDIA H200", VERSIONS)
    assert found.is_searched(SITE)
    assert found.get(merely) == config
    assert not found.is_searched(merely)
    assert found.get(Site("rms_norm", (7, 2048), "bfloat16")) is None


def test_a_search_replaces_what_was_merely_measured(folder):
    found = TunedConfigs(folder, "NVIDIA H200", VERSIONS)
    found.add(SITE, CONFIG, 0.02, is_searched=False)
    found.add(SITE, CONFIG, 0.02)
    assert TunedConfigs(folder, "NVIDIA H200", VERSIONS).is_searched(SITE)


def test_damaged_lines_and_unknown_configs_are_skipped_and_stay_in_the_file(folder):
    found = TunedConfigs(folder, "NVIDIA H200", VERSIONS)
    whole = found.path.read_text()
    row = json.loads(whole)
    row["params"] = {"BLOCK_N": 3}
    found.path.write_text(whole + '{"site": "rms_n\n[1]\n\n' + json.dumps(row) + "\n")
    again = TunedConfigs(folder, "NVIDIA H200", VERSIONS)
    assert again.get(SITE) == CONFIG
    assert again.num_unreadable == 3
    assert found.path.read_text().startswith(whole)


def test_an_edited_kernel_is_searched_again(folder, monkeypatch):
    monkeypatch.setattr("agnitra_lab.generate.tuned.kernel_sha256", lambda template: "0" * 64)
    assert TunedConfigs(folder, "NVIDIA H200", VERSIONS).get(SITE) is None


def test_a_folder_that_cannot_be_written_costs_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    found = TunedConfigs(tmp_path / "file", "NVIDIA H200", VERSIONS)
    found.add(SITE, CONFIG, 0.02)
    assert found.get(SITE) == CONFIG
