"""From a place in the graph to the configs that are measured there."""

from agnitra_lab.contracts.kernel import Site
from agnitra_lab.contracts.search import KernelConfig
from agnitra_lab.contracts.suggestion import Suggestion
from agnitra_lab.generate.defaults import default_config
from agnitra_lab.generate.kernels import KernelBook, seed_configs, space_of

SITE = Site("rms_norm", (4096, 2048), "bfloat16")


def suggestion(**fields: object) -> Suggestion:
    given = {"action": "rms_norm", "block_size": 2048, "tile_shape": (1, 2048), "unroll_factor": 1, **fields}
    return Suggestion(target_latency_ms=1.0, expected_latency_ms=1.0, rationale="r", source="llm:m", **given)


def ask(book: KernelBook, site: Site = SITE) -> KernelConfig | None:
    kernel = book(site.template, site.shape, site.dtype)
    return kernel.config if kernel is not None else None


def test_a_suggestion_only_chooses_among_the_valid_configs() -> None:
    seeds = seed_configs(SITE, [suggestion(block_size=65536, num_warps=1, num_stages=8)])
    valid = {config.key() for config in space_of(SITE).configs}
    assert {config.key() for config in seeds} <= valid


def test_suggestions_of_other_actions_seed_nothing() -> None:
    assert seed_configs(SITE, [suggestion(action="swiglu")]) == seed_configs(SITE, [])


def test_a_book_gives_the_rule_of_thumb_where_nothing_was_tuned() -> None:
    assert ask(KernelBook()) == default_config("rms_norm", (4096, 2048), "bfloat16")


def test_a_book_gives_the_tuned_config_at_its_own_site_alone() -> None:
    tuned = space_of(SITE).configs[-1]
    book = KernelBook({SITE: tuned})
    assert ask(book) == tuned
    assert ask(book, Site("rms_norm", (8, 64), "bfloat16")) == default_config("rms_norm", (8, 64), "bfloat16")


def test_a_book_has_no_kernel_for_a_dtype_that_the_template_does_not_take() -> None:
    book = KernelBook()
    assert ask(book, Site("rms_norm", (4096, 2048), "float64")) is None
    assert not book.sites


def test_a_survey_counts_the_sites_and_gives_no_kernel() -> None:
    book = KernelBook(is_survey=True)
    assert ask(book) is None
    assert ask(book) is None
    assert book.sites == {SITE: 2}
    assert book.kernels == []


def test_a_site_where_all_that_was_tried_failed_gets_no_kernel() -> None:
    book = KernelBook(refused={SITE: "every config failed"})
    assert ask(book) is None
    assert ask(book, Site("rms_norm", (8, 64), "bfloat16")) is not None
    assert book.why_not(SITE.template, SITE.shape, f"torch.{SITE.dtype}") == "every config failed"
    assert book.why_not("rms_norm", (8, 64), "bfloat16") is None


def test_a_site_that_nobody_has_tuned_is_asked_about_once_and_keeps_the_answer() -> None:
    asked, answer = [], space_of(SITE).configs[-1]
    book = KernelBook()
    book.find = lambda site: asked.append(site) or answer
    assert [ask(book), ask(book)] == [answer, answer]
    assert asked == [SITE]
    assert book.tuned == {SITE: answer}


def test_a_site_for_which_nothing_is_found_gets_no_kernel_and_is_not_asked_about_again() -> None:
    asked: list[Site] = []
    book = KernelBook(refused={Site("rms_norm", (8, 64), "bfloat16"): "every config failed"})
    book.find = asked.append
    assert [ask(book), ask(book), ask(book, Site("rms_norm", (8, 64), "bfloat16"))] == [None, None, None]
    assert asked == [SITE]
