"""The suite's workloads run, repeat exactly, take fresh inputs, and keep their weights."""

from dataclasses import replace

import pytest
import torch

from agnitra_lab.contracts import Workload
from agnitra_lab.errors import TargetError
from agnitra_lab.workloads import dlrm, resnet
from agnitra_lab.workloads.attention_by_hand import HandAttention
from agnitra_lab.workloads.decoders import WINDOW_SCALES, SlidingWindowDecoder
from agnitra_lab.workloads.layers import layer_norm_large
from agnitra_lab.workloads.mamba import chunked_scan
from agnitra_lab.workloads.moe import Experts
from agnitra_lab.workloads.suite import SUITE, _build, suite_rows, suite_workload
from agnitra_lab.workloads.target import resolve

# Dynamo refuses recurrent networks; the 8B decoders are the code of the 1B ones.
NOT_CAPTURED = {"lstm", "gru", "llama-8b-decode", "llama-8b-prefill"}
# Probabilities of a row of hundreds lie close together; every other output is spread about its mean.
NARROW = {"softmax-long-rows"}


def tiny(name: str) -> Workload:
    return suite_workload(name, scale="tiny", device="cpu")


def specs(values: object) -> list[tuple[torch.Size, torch.dtype]]:
    return [(value.shape, value.dtype) for value in values]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", SUITE)
def test_a_workload_resolves_and_gives_finite_outputs_that_depend_on_its_inputs(name: str) -> None:
    workload = resolve(f"suite:{name}@tiny")
    assert (workload.name, workload.settings["scale"]) == (name, "tiny")
    args, kwargs = workload.make_inputs(1)
    with torch.no_grad():
        first, other = workload(), workload.model(*args, **kwargs)
    assert torch.isfinite(first).all()
    assert first.std() > (1e-4 if name in NARROW else 0.01)
    assert not torch.allclose(first, other)
    assert specs(args) == specs(workload.args)
    assert specs(kwargs.values()) == specs(workload.kwargs.values())


@pytest.mark.parametrize("name", SUITE)
def test_a_workload_is_the_same_each_time_it_is_built_and_called(name: str) -> None:
    first, second = tiny(name), tiny(name)
    with torch.no_grad():
        out = first()
        assert torch.equal(out, second())
        assert torch.equal(out, first())


@pytest.mark.parametrize("name", SUITE)
def test_a_call_leaves_weights_statistics_and_inputs_as_they_were(name: str) -> None:
    workload = tiny(name)
    held = {key: value for key, value in workload.model.state_dict().items() if "cache" not in key}
    held |= {f"args.{index}": value for index, value in enumerate(workload.args)} | dict(workload.kwargs)
    before = {key: value.clone() for key, value in held.items()}
    with torch.no_grad():
        workload()
    assert all(torch.equal(before[key], held[key]) for key in held)


@pytest.mark.parametrize("name", SUITE)
def test_every_scale_of_a_workload_has_its_own_sizes(name: str) -> None:
    with torch.device("meta"):
        settings = [
            {**_build(name, scale, "meta", torch.float32).settings, "scale": ""} for scale in ("tiny", "small", "full")
        ]
    assert settings[0] != settings[1] != settings[2] != settings[0]


@pytest.mark.parametrize("name", [name for name in SUITE if name not in NOT_CAPTURED])
def test_a_workload_is_one_graph_that_computes_the_same(name: str) -> None:
    workload = tiny(name)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = workload()
        captured = torch.compile(workload.model, backend="eager", fullgraph=True)
        assert torch.equal(captured(*workload.args, **workload.kwargs), expected)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_a_recurrent_workload_can_be_exported_though_dynamo_refuses_it(name: str) -> None:
    workload = tiny(name)
    with torch.no_grad():
        program = torch.export.export(workload.model, workload.args, strict=False)
        assert torch.equal(program.module()(*workload.args), workload())


def test_the_list_counts_the_parameters_of_the_full_scale() -> None:
    rows = {row.name: row for row in suite_rows(["llama-1b-decode", "llama-1b-prefill", "gpt2-prefill", "cumsum"])}
    assert rows["llama-1b-decode"].num_parameters == rows["llama-1b-prefill"].num_parameters == 1_100_048_384
    assert (rows["llama-1b-decode"].phase, rows["llama-1b-decode"].items_per_call) == ("decode", 1)
    # Tied embedding and head count once: six blocks, two embedding tables, the last norm.
    blocks = 6 * (12 * 768**2 + 13 * 768)
    assert rows["gpt2-prefill"].num_parameters == blocks + (50_257 + 1024) * 768 + 2 * 768
    assert (rows["cumsum"].num_parameters, rows["cumsum"].phase) == (0, None)


def test_the_suite_has_at_least_24_workloads_and_every_kind_of_model() -> None:
    assert len(SUITE) >= 24
    assert len({entry.family for entry in SUITE.values()}) == 8


def test_an_unknown_workload_or_scale_lists_the_known_ones() -> None:
    with pytest.raises(TargetError, match=r"gpt-5.*llama-1b-decode"):
        resolve("suite:gpt-5")
    with pytest.raises(TargetError, match=r"huge.*tiny, small, full"):
        resolve("suite:bert@huge")


def test_hand_written_attention_equals_the_fused_one() -> None:
    workload = tiny("attention-by-hand")
    model, (x,) = workload.model, workload.args
    assert isinstance(model, HandAttention)
    q, k, v = (layer(x).unflatten(-1, (4, 8)).transpose(1, 2) for layer in (model.query, model.key, model.value))
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(model(x), model.proj(fused.transpose(1, 2).flatten(2)), atol=1e-5)


def test_a_token_outside_the_window_changes_nothing_in_one_layer() -> None:
    torch.manual_seed(0)
    config = replace(WINDOW_SCALES["tiny"], num_layers=1)
    model = SlidingWindowDecoder(config).eval()
    tokens = torch.arange(32)[None]
    changed = tokens.clone()
    changed[0, 0] = 99
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[0, config.window :], after[0, config.window :])
    assert not torch.equal(before[0, config.window - 1], after[0, config.window - 1])


def test_padding_changes_no_token_that_is_there() -> None:
    workload = tiny("bert-padded")
    (tokens,), mask = workload.args, workload.kwargs["attention_mask"]
    assert 0 < mask.sum() < mask.numel()
    other = torch.where(mask == 1, tokens, 7)
    with torch.no_grad():
        kept = mask.bool()
        assert torch.allclose(workload()[kept], workload.model(other, attention_mask=mask)[kept], atol=1e-6)


def test_the_chunked_scan_is_the_recurrence() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 12, 3, 4, generator=generator)
    decay = -torch.rand(2, 12, 3, generator=generator)
    into, out = (torch.randn(2, 12, 5, generator=generator) for _ in range(2))
    state, steps = torch.zeros(2, 3, 4, 5), []
    for t in range(12):
        state = torch.exp(decay[:, t])[..., None, None] * state + torch.einsum("bhp,bn->bhpn", x[:, t], into[:, t])
        steps.append(torch.einsum("bhpn,bn->bhp", state, out[:, t]))
    assert torch.allclose(chunked_scan(x, decay, into, out, chunk=4), torch.stack(steps, dim=1), atol=1e-5)


def test_the_experts_are_the_chosen_ones_only() -> None:
    workload = tiny("moe-prefill")
    experts = workload.model.layers[0].mlp
    assert isinstance(experts, Experts)
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    scores = torch.softmax(experts.router(x), dim=-1)
    expected = torch.zeros_like(x)
    for t in range(3):
        for expert in scores[0, t].topk(2).indices.tolist():
            gate, up = (x[0, t] @ experts.gate_up_proj[expert]).chunk(2)
            out = (torch.nn.functional.silu(gate) * up) @ experts.down_proj[expert]
            expected[0, t] += scores[0, t, expert] * out
    assert torch.allclose(experts(x), expected, atol=1e-5)


def test_no_choice_of_experts_is_near_a_tie() -> None:
    workload = tiny("moe-prefill")
    gaps = []

    def keep(_module: object, _args: object, out: torch.Tensor) -> None:
        ranked = out.flatten(0, -2).sort(dim=-1, descending=True).values
        gaps.append((ranked[:, 1] - ranked[:, 2]).min())

    for layer in workload.model.layers:
        layer.mlp.router.register_forward_hook(keep)
    with torch.no_grad():
        workload()
    assert min(gaps) > 0.05


def test_the_weight_of_a_large_norm_lies_about_one() -> None:
    weight = layer_norm_large("tiny", "cpu", torch.float32).model.weight
    assert 0.9 < weight.mean() < 1.1


def test_convolutions_over_one_and_three_dimensions_keep_the_scale_of_activations() -> None:
    clips = tiny("video-conv3d")
    stem = clips.model.stem(clips.args[0])
    assert 1.0 < stem.std() < 2.0
    audio = tiny("whisper-encoder")
    assert 1.0 < audio.model.conv1(audio.args[0]).std() < 2.0


def test_the_shared_models_keep_their_own_sizes() -> None:
    assert suite_workload("resnet50", scale="tiny", device="cpu").settings["width"] == resnet.SCALES["tiny"].width
    assert resnet.SCALES["full"].num_blocks == (3, 4, 6, 3)
    assert dlrm.SCALES["full"].rows == 1_000_000
