"""Kernels compiled ahead in processes without a GPU, as a graph calls them."""

import pytest

pytest.importorskip("triton")

from agnitra_lab.contracts.kernel import Launch, Site, TensorLayout
from agnitra_lab.generate.defaults import default_config
from agnitra_lab.loop.compilers import Compilers

H200 = ("cuda", 90, 32)
SITE = Site("skinny_gemm", (1, 128, 64), "bfloat16")


def launch(**options):
    x, weight = TensorLayout((1, 1, 64), (64, 64, 1), 0, "bfloat16"), TensorLayout((128, 64), (64, 1), 0, "bfloat16")
    return Launch(SITE, (x, weight), tuple(options.items()))


def test_another_way_of_calling_a_config_is_another_kernel_and_the_same_way_is_in_the_cache(tmp_path):
    plain = launch()
    normed = launch(norm_weight=TensorLayout((64,), (1,), 0, "bfloat16"), eps=1e-5, cast_before_weight=True)
    params = default_config(SITE.template, SITE.shape, SITE.dtype).params
    compilers = Compilers(1, {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"})
    try:
        asked = [compilers.submit(SITE, params, H200, called) for called in (plain, normed, plain)]
        first, other, again = [future.result(timeout=120).value for future in asked]
    finally:
        compilers.stop()
        compilers.join()
    assert first.kernels[0].hash != other.kernels[0].hash
    assert first.kernels[0].compile_s > 0
    assert again.kernels[0].hash == first.kernels[0].hash
    assert again.kernels[0].compile_s is None
