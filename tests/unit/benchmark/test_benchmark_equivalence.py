"""The gate: what computes the same passes, and every known way of not computing it fails, with its reason."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from agnitra_lab.benchmark.equivalence import check
from agnitra_lab.benchmark.reference import Reference
from agnitra_lab.contracts.measurement import Equivalence
from agnitra_lab.contracts.workload import Inputs, Workload
from agnitra_lab.errors import UsageError


class Mlp(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 48)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.gelu(self.up(x)))


class Decoder(nn.Module):
    """Writes its input into a cache at a position and sums what the cache holds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(8, 16))
        self.num_calls = 0

    def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        self.cache[position] = x
        return self.cache.cumsum(0) * self.num_calls


MODEL = Mlp().eval()
X = torch.randn(256, 32, generator=torch.Generator().manual_seed(1))
WORKLOAD = Workload("mlp", MODEL, (X,))


def _problems(candidate: Callable[..., Any], workload: Workload = WORKLOAD, **settings: Any) -> str:
    found = check(workload, candidate, **settings)
    assert not found.is_equivalent
    return "; ".join(found.problems)


def _check_passes(candidate: Callable[..., Any], workload: Workload = WORKLOAD, **settings: Any) -> Equivalence:
    found = check(workload, candidate, **settings)
    assert found.problems == ()
    assert found.is_equivalent
    return found


def test_the_model_itself_is_equivalent_with_an_error_ratio_of_one() -> None:
    found = _check_passes(MODEL)
    assert (found.match_share, found.error_ratio, found.num_seeds) == (1.0, 1.0, 3)
    assert found.error_vs_fp64 is not None
    assert 0 < found.error_vs_fp64 < 1e-5


def test_other_rounding_in_the_same_precision_is_equivalent() -> None:
    def in_two_halves(x: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.gelu(MODEL.up(x))
        weight = MODEL.down.weight
        return hidden[:, :32] @ weight[:, :32].T + (hidden[:, 32:] @ weight[:, 32:].T + MODEL.down.bias)

    assert _check_passes(in_two_halves).max_abs_error > 0


def test_a_more_accurate_candidate_is_never_punished() -> None:
    low = Mlp(torch.bfloat16).eval()
    wide = copy.deepcopy(low).double()
    found = _check_passes(lambda x: wide(x.double()).bfloat16(), Workload("mlp", low, (X.bfloat16(),)))
    assert found.error_ratio is not None
    assert found.error_ratio < 1


def test_zeros_fail() -> None:
    assert "tolerances off" in _problems(lambda x: torch.zeros(256, 48))


def test_the_mean_fails() -> None:
    assert "tolerances off" in _problems(lambda x: MODEL(x).mean().expand(256, 48).clone())


def test_the_remembered_output_of_the_first_call_fails() -> None:
    memory: list[torch.Tensor] = []

    def remembered(x: torch.Tensor) -> torch.Tensor:
        if not memory:
            memory.append(MODEL(x))
        return memory[0].clone()

    assert "tolerances off" in _problems(remembered)


def test_a_result_remembered_by_address_fails() -> None:
    memory: dict[int, torch.Tensor] = {}

    def remembered(x: torch.Tensor) -> torch.Tensor:
        return memory.setdefault(x.data_ptr(), MODEL(x)).clone()

    workload = Workload("mlp", MODEL, (X,), make_inputs=lambda seed: ((X * (seed % 7 + 1),), {}))
    found = check(workload, remembered)
    # The allocator may give every copy an address of its own; then nothing was remembered.
    assert not found.is_equivalent or len(memory) == found.num_seeds


def test_shuffled_outputs_fail() -> None:
    assert "tolerances off" in _problems(lambda x: MODEL(x).flip(0).contiguous())


def test_one_lost_tail_block_fails_even_below_the_share() -> None:
    model = Mlp().eval()

    def without_tail(x: torch.Tensor) -> torch.Tensor:
        out = model(x)
        out.view(-1)[-8:] = 0
        return out

    x = torch.randn(1024, 32)
    assert 8 / (1024 * 48) < 0.001
    assert "tolerances off" in _problems(without_tail, Workload("f", lambda x: model(x), (x,)))
    assert "tolerances off" in _problems(without_tail, Workload("m", model, (x,)))


def test_a_candidate_that_leaves_its_output_unwritten_fails() -> None:
    assert _problems(lambda x: torch.empty(256, 48))


def test_half_precision_inside_a_float32_model_fails_against_fp64() -> None:
    half = copy.deepcopy(MODEL).half()
    problems = _problems(lambda x: half(x.half()).float())
    assert "error against fp64" in problems


class Loss(torch.nn.Module):
    """A mean over the rows' squared lengths: one number."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.square().sum(1).mean()


def a_step_off(value: torch.Tensor, steps: int) -> torch.Tensor:
    """Move a value away from its exact one by steps of the last place, upwards."""
    for _ in range(steps):
        value = torch.nextafter(value, torch.tensor(float("inf")))
    return value


def rounded_exactly(x: torch.Tensor) -> torch.Tensor:
    return Loss()(x.double()).float()


@pytest.mark.parametrize(("steps", "is_right"), [(0, True), (8, False)])
def test_a_loss_within_one_rounding_is_right_however_lucky_the_baseline_was(steps: int, is_right: bool) -> None:
    class Lucky(Loss):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.double()).to(x.dtype)

    def below_or_above(x: torch.Tensor) -> torch.Tensor:
        exact, nearest = Loss()(x.double()), rounded_exactly(x)
        other = torch.nextafter(nearest, torch.tensor(float("inf") if exact > nearest.double() else 0.0))
        return a_step_off(other, steps)

    found = check(Workload("loss", Lucky(), (X,)), below_or_above)
    assert found.error_ratio is None or found.error_ratio > 1.25
    assert found.is_equivalent == is_right, found.problems
    if is_right:
        assert "one rounding" in str(found.oracle_note)
    else:
        assert "or one rounding" in found.problems[0]


def test_a_tail_that_a_loss_leaves_out_fails() -> None:
    class Mean(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.square().mean()

    rows = torch.rand(16384, 4) + 1
    found = check(Workload("loss", Mean(), (rows,)), lambda x: x[:-1].square().sum() / x.numel())
    assert "error against fp64" in found.problems[0]


def test_a_float32_output_rounded_to_half_fails_without_an_oracle_too() -> None:
    def plain(x: torch.Tensor) -> torch.Tensor:
        return MODEL(x)

    found = check(Workload("f", plain, (X,)), lambda x: MODEL(x).half().float())
    assert not found.is_equivalent
    assert found.match_share < 0.999
    assert found.oracle_note is not None
    assert "plain function" in found.oracle_note


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        (lambda x: MODEL(x).double(), "has dtype torch.float64, the baseline's torch.float32"),
        (lambda x: MODEL(x)[:, :1], "has shape (256, 1)"),
        (lambda x: MODEL(x)[None], "has shape (1, 256, 48)"),
        (lambda x: MODEL(x).T.contiguous().T, "has strides (1, 256)"),
        (lambda x: (MODEL(x),), "the output's structure differs"),
        (lambda x: None, "type"),
    ],
)
def test_a_visible_difference_is_named(candidate: Callable[..., Any], reason: str) -> None:
    assert reason in _problems(candidate)


def test_nan_where_the_baseline_has_a_number_fails() -> None:
    def poisoned(x: torch.Tensor) -> torch.Tensor:
        out = MODEL(x)
        out[3, 5] = float("nan")
        return out

    assert "NaN or infinity differs at 1 of" in _problems(poisoned)


def test_nan_in_the_same_places_passes() -> None:
    def masked(x: torch.Tensor) -> torch.Tensor:
        return MODEL(x).masked_fill(x[:, :1] > 0, float("nan"))

    _check_passes(lambda x: masked(x).clone(), Workload("f", masked, (X,)))


class LazyTensor(torch.Tensor):
    pass


def test_a_tensor_subclass_that_could_answer_later_fails() -> None:
    assert "has type LazyTensor" in _problems(lambda x: MODEL(x).as_subclass(LazyTensor))


def test_a_mutated_input_fails_and_is_counted_as_such() -> None:
    def mutating(x: torch.Tensor) -> torch.Tensor:
        out = MODEL(x)
        x.zero_()
        return out

    found = check(WORKLOAD, mutating)
    assert not found.are_inputs_unchanged
    assert "input[0][0] is left different" in "; ".join(found.problems)


def test_an_input_that_the_baseline_mutates_must_be_mutated_alike() -> None:
    def adds_in_place(x: torch.Tensor) -> torch.Tensor:
        return x.add_(1).sum(1)

    workload = Workload("in place", adds_in_place, (X,))
    _check_passes(adds_in_place, workload)
    assert "is left different" in _problems(lambda x: (x + 1).sum(1), workload)


class Step(nn.Module):
    """Multiplies many times in bf16, and writes what comes of it to one slot of the cache that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(24)))
        for layer in self.layers:
            nn.init.orthogonal_(layer.weight)

    def forward(self, x: torch.Tensor, cache: dict[str, torch.Tensor]) -> torch.Tensor:
        cache["keys"][3] = self.layers(x)
        return cache["keys"][:4].float().mean(1)


@pytest.mark.parametrize(("factor", "is_right"), [(1.0, True), (1.02, False)], ids=["rounded once", "scaled"])
def test_what_a_call_writes_to_an_input_is_held_against_fp64_as_state_is(factor: float, is_right: bool) -> None:
    torch.manual_seed(0)
    model = Step().bfloat16().eval()

    def make_inputs(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        x, keys = (torch.randn(shape, generator=generator).bfloat16() for shape in ((256,), (8, 256)))
        return (x, {"keys": keys}), {}

    wide = copy.deepcopy(model).double()

    def in_one_rounding(x: torch.Tensor, cache: dict[str, torch.Tensor]) -> torch.Tensor:
        cache["keys"][3] = (factor * wide.layers(x.double())).bfloat16()
        return cache["keys"][:4].float().mean(1)

    found = check(Workload("step", model, *make_inputs(0), make_inputs=make_inputs), in_one_rounding)
    assert found.are_inputs_unchanged == is_right, found.problems
    if not is_right:
        assert any("input[0][1]['keys'] is left different" in problem for problem in found.problems)


def test_an_output_that_aliases_an_input_fails_when_the_baseline_copies() -> None:
    workload = Workload("identity", lambda x: x.clone(), (X,))
    assert "shares memory with input[0][0], the baseline's with nothing" in _problems(lambda x: x, workload)


def test_views_of_one_buffer_that_share_no_element_pass() -> None:
    def halves(x: torch.Tensor) -> Any:
        out = MODEL(x)
        return out[:, :24], out[:, 24:]

    def separate(x: torch.Tensor) -> Any:
        out = torch.cat([MODEL(x)] * 2, dim=1)
        return out[:, :48][:, :24].clone(memory_format=torch.preserve_format), out[:, 24:48].clone()

    workload = Workload("halves", halves, (X,))
    _check_passes(lambda x: tuple(part for part in MODEL(x).split(24, dim=1)), workload)
    assert "strides" in _problems(separate, workload)


def test_a_cache_must_be_written_as_the_baseline_writes_it() -> None:
    model = Decoder().eval()
    workload = Workload("decode", model, (torch.randn(16), torch.tensor(3)))
    twin = copy.deepcopy(model)
    _check_passes(twin, workload)
    cache = model.cache

    def forgetful(x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        filled = cache.clone()
        filled[position] = x
        return filled.cumsum(0)

    assert "state cache is left different" in _problems(forgetful, workload)


class Scaled(nn.Module):
    """Writes its input, scaled in two roundings of bf16, into a cache that may already hold just that."""

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(8, x.numel(), dtype=x.dtype))
        self.cache[3] = x * 1.37 * 1.11

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cache[3] = x * 1.37 * 1.11
        return self.cache[:4].sum(0)


def test_a_written_value_that_was_there_before_may_round_otherwise() -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(3)).bfloat16()
    model = Scaled(x).eval()
    workload = Workload("scaled", model, (x,), make_inputs=lambda seed: ((x,), {}))

    def in_one_rounding(x: torch.Tensor) -> torch.Tensor:
        model.cache[3] = (x.double() * 1.37 * 1.11).bfloat16()
        return model.cache[:4].double().sum(0).bfloat16()

    def beside_the_slot(x: torch.Tensor) -> torch.Tensor:
        out = model(x)
        model.cache[4, 7] = 1e-6
        return out

    _check_passes(in_one_rounding, workload)
    assert "1 elements that it does not write" in _problems(beside_the_slot, workload)


def test_a_model_that_ran_on_the_inputs_of_a_seed_still_shows_all_that_the_call_writes() -> None:
    # Of a slot that holds eager's own answer already, only what a candidate rounds otherwise would count, all misses.
    model = Decoder().eval()

    def make_inputs(seed: int) -> Inputs:
        return (torch.randn(16, generator=torch.Generator().manual_seed(seed)), torch.tensor([3])), {}

    args, kwargs = make_inputs(0)
    model(*args, **kwargs)
    reference = Reference(Workload("decoder", model, args, kwargs, make_inputs=make_inputs))
    reference.probe()
    before, after = reference.answer(0, make_inputs(0)).wanted.state_after["cache"]
    assert int((before != after).sum()) == 16


def test_a_check_leaves_buffers_and_counters_as_it_found_them() -> None:
    model = Decoder().eval()
    workload = Workload("decoder", model, (torch.randn(16), torch.tensor([3])))
    model.cache[3] = 7.0
    _check_passes(lambda x, position: model(x, position), workload)
    assert model.cache[3].eq(7.0).all()
    assert model.num_calls == 0


class TwoCaches(nn.Module):
    """Writes a slot of one cache, and of a second one what it reads of the first, as the layers of a decoder do."""

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.register_buffer("first", torch.randn(8, x.numel(), generator=generator).to(x.dtype))
        self.register_buffer("second", torch.randn(8, x.numel(), generator=generator).to(x.dtype))
        self(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.first[3] = x * 1.37 * 1.11
        self.second[3] = self.first.sum(0) * 1.03 * 0.97
        return self.second[:4].sum(0)


def test_a_second_cache_that_follows_the_first_may_round_otherwise() -> None:
    # Were all elements of the first cache nudged, the second one's new values would move as well, onto their old ones.
    x = torch.randn(4096, generator=torch.Generator().manual_seed(3)).bfloat16()
    model = TwoCaches(x).eval()
    workload = Workload("two-caches", model, (x,), make_inputs=lambda seed: ((x,), {}))

    def in_one_rounding(x: torch.Tensor) -> torch.Tensor:
        model.first[3] = (x.double() * 1.37 * 1.11).bfloat16()
        model.second[3] = (model.first.double().sum(0) * 1.03 * 0.97).bfloat16()
        return model.second[:4].double().sum(0).bfloat16()

    _check_passes(in_one_rounding, workload)


def test_the_model_is_left_as_it_was_found() -> None:
    model = Decoder().eval()
    check(Workload("decode", model, (torch.randn(16), torch.tensor(3))), copy.deepcopy(model))
    assert model.cache.abs().sum() == 0
    assert model.num_calls == 0


def test_a_candidate_that_writes_to_the_weights_fails() -> None:
    model = Mlp().eval()

    def scaling(x: torch.Tensor) -> torch.Tensor:
        out = model(x)
        model.down.weight.mul_(1.0)
        return out

    assert "writes to the model's parameters" in _problems(scaling, Workload("mlp", model, (X,)))


def test_integer_outputs_must_be_equal() -> None:
    def top(x: torch.Tensor) -> torch.Tensor:
        return MODEL(x).argmax(-1)

    def off_by_one(x: torch.Tensor) -> torch.Tensor:
        out = top(x)
        out[0] = (out[0] + 1) % 48
        return out

    workload = Workload("top", top, (X,))
    _check_passes(lambda x: top(x).clone(), workload)
    assert "1 of 256 integers differ" in _problems(off_by_one, workload)


def test_an_output_that_ignores_its_input_proves_nothing() -> None:
    constant = torch.ones(4)
    workload = Workload("constant", lambda x: constant * 2, (X,))
    assert "does not depend on the input" in _problems(lambda x: constant + 1, workload)


def test_a_candidate_that_raises_is_not_equivalent_and_its_message_is_kept() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no kernel for this shape")

    assert "the candidate raised ValueError: no kernel for this shape" in _problems(broken)


def test_a_baseline_that_raises_is_the_users_to_mend() -> None:
    with pytest.raises(UsageError, match="baseline raised"):
        check(Workload("wrong", MODEL, (torch.randn(2, 5),)), MODEL)


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    cache: list[torch.Tensor]
    name: str = "out"


def test_nested_outputs_are_compared_leaf_by_leaf_and_named_by_path() -> None:
    def nested(x: torch.Tensor) -> Output:
        return Output(MODEL(x), [x * 2, x * 3])

    def wrong(x: torch.Tensor) -> Output:
        return Output(MODEL(x), [x * 2, x * 4])

    workload = Workload("nested", nested, (X,))
    _check_passes(nested, workload)
    assert "output.cache[1]:" in _problems(wrong, workload)


def test_dropout_draws_the_same_mask_for_both() -> None:
    model = nn.Sequential(Mlp(), nn.Dropout(0.5)).train()
    _check_passes(copy.deepcopy(model), Workload("dropout", model, (X,)))


def test_top1_agreement_is_reported_for_language_models_only() -> None:
    assert check(WORKLOAD, MODEL).top1_agreement is None
    assert check(Workload("llm", MODEL, (X,), phase="decode"), MODEL).top1_agreement == 1.0


def test_norms_that_cast_to_float32_are_still_judged_in_double() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(32, dtype=torch.bfloat16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wide = x.to(torch.float32)
            return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * self.weight

    model = Norm().eval()
    found = _check_passes(copy.deepcopy(model), Workload("norm", model, (X.bfloat16(),)))
    assert found.error_vs_fp64 is not None
    assert found.error_vs_fp64 > 1e-4


class Deep(nn.Module):
    """A stack whose bf16 rounding adds up until eager itself misses the share against fp64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(24))
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.mul_(1.5)
        self.bfloat16()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.sin(layer(x))
        return x


def _deep_workload(model: Deep) -> Workload:
    generator = torch.Generator().manual_seed(2)
    return Workload("deep", model, (torch.randn(128, 64, generator=generator).bfloat16(),))


def test_a_deep_bf16_model_is_held_to_eagers_own_share_against_fp64() -> None:
    model = Deep().eval()

    def fused(x: torch.Tensor) -> torch.Tensor:
        for layer in model.layers:
            x = (x.float() + torch.sin(x.float() @ layer.weight.float().T + layer.bias.float())).bfloat16()
        return x

    found = _check_passes(fused, _deep_workload(model))
    assert found.required_share < 0.999
    assert found.oracle_note is not None
    assert "share against fp64 decided" in found.oracle_note


def test_a_deep_bf16_model_with_a_narrower_product_fails() -> None:
    model = Deep().eval()

    def narrow(x: torch.Tensor) -> torch.Tensor:
        for layer in model.layers:
            x = x + torch.sin(layer(x.to(torch.float8_e4m3fn).bfloat16()))
        return x

    assert _problems(narrow, _deep_workload(model))


def test_the_relaxed_track_takes_what_the_exact_one_refuses() -> None:
    half = copy.deepcopy(MODEL).bfloat16()

    def low(x: torch.Tensor) -> torch.Tensor:
        return half(x.bfloat16()).float()

    assert not check(WORKLOAD, low).is_equivalent
    _check_passes(low, precision_track="relaxed", required_share=0.95)


def test_no_seeds_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="seeds"):
        check(WORKLOAD, MODEL, seeds=())


class TwoLogits(torch.nn.Module):
    """A classifier of four numbers a seed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = torch.nn.Linear(512, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(x))


@pytest.mark.parametrize("first_seed", range(0, 90, 3))
def test_few_numbers_are_judged_on_many_seeds_so_that_luck_refuses_nobody(first_seed: int) -> None:
    model = TwoLogits()

    def in_another_order(x: torch.Tensor) -> torch.Tensor:
        products = torch.tanh(x)[:, None] * model.head.weight
        return sum(products.split(64, dim=-1)).sum(-1) + model.head.bias

    workload = Workload("logits", model, (torch.randn(2, 512),))
    found = check(workload, in_another_order, seeds=(first_seed, first_seed + 1, first_seed + 2))
    assert found.is_equivalent, found.problems


def test_few_numbers_with_twice_the_error_are_refused_all_the_same() -> None:
    model = TwoLogits()

    def coarser(x: torch.Tensor) -> torch.Tensor:
        exact = (torch.tanh(x.double()) @ model.head.weight.double().T + model.head.bias.double()).detach()
        return (exact + 2.0 * (model(x).double() - exact)).float()

    found = check(Workload("logits", model, (torch.randn(2, 512),)), coarser)
    assert any("error against fp64" in problem for problem in found.problems)
