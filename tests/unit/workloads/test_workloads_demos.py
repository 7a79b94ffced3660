"""The named models run, repeat exactly, and take fresh inputs."""

import pytest
import torch

from agnitra_lab.errors import TargetError
from agnitra_lab.workloads.demos import DEMOS, demo


@pytest.mark.parametrize("name", DEMOS)
def test_a_demo_gives_finite_outputs_that_depend_on_its_inputs(name: str) -> None:
    workload = demo(name, scale="tiny", device="cpu")
    with torch.no_grad():
        first = workload()
        args, kwargs = workload.make_inputs(1)
        other = workload.model(*args, **kwargs)
    assert torch.isfinite(first).all()
    assert first.std() > 0.01
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("name", DEMOS)
def test_a_demo_is_the_same_each_time_it_is_built(name: str) -> None:
    first, second = (demo(name, scale="tiny", device="cpu") for _ in range(2))
    with torch.no_grad():
        assert torch.equal(first(), second())


def test_decoding_writes_its_keys_into_the_static_cache() -> None:
    workload = demo("llama-decode", scale="tiny", device="cpu")
    cache = workload.model.layers[0].attention.k_cache_BGCD
    before = cache.clone()
    with torch.no_grad():
        workload()
    assert torch.equal(before[:, :, :-1], cache[:, :, :-1])
    assert not torch.equal(before[:, :, -1], cache[:, :, -1])


def test_the_full_decoder_has_1_1_billion_parameters() -> None:
    from agnitra_lab.workloads.llama import DECODE_SCALES, Llama

    with torch.device("meta"):
        model = Llama(DECODE_SCALES["full"], has_cache=False)
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_100_048_384


def test_an_unknown_demo_lists_the_known_ones() -> None:
    with pytest.raises(TargetError, match="llama-decode"):
        demo("gpt-5")
