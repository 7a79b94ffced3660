"""The redactor looks only where a credential can begin, and finds what looking everywhere finds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agnitra_lab import redact
from agnitra_lab.redact import REDACTED

PIECES = (
    "sk-", "pk-", "rk-", "ghp_", "ghr_", "hf_", "AKIA", "eyJ", "Bearer ", "bEARER\n", "://", "https://me:pw@", "a+b.c",
    "@", "/", ".", "-", "_", " ", "\n", "--token ", "--api-key=", "ABCDEFGHIJKLMNOP", "abcdefghij0123456789", "x" * 16,
    "eyJhbGciOi.eyJzdWIiOi.SflKxwRJSM", "\u0130", "\xe9",
)  # fmt: skip


def looked_at_everywhere(text: str) -> str:
    text = redact._SECRET_FLAG.sub(rf"\1{REDACTED}", text)
    text = redact._SECRET_TEXT.sub(REDACTED, text)
    return redact._URL_USERINFO.sub(rf"\1{REDACTED}@", text)


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_looking_only_where_a_credential_can_begin_finds_every_one(text: str) -> None:
    assert redact._redacted_text(text, [], "") == looked_at_everywhere(text)


@given(st.lists(st.sampled_from(PIECES), max_size=4))
def test_texts_of_a_batch_are_redacted_one_by_one(texts: list[str]) -> None:
    assert redact.redact_texts([*texts, "--api-key", "name"]) == [
        *map(redact.redact_text, texts), "--api-key", "name"
    ]  # fmt: skip
