"""From a language model's text to suggestions: the answer is untrusted, so every door is closed.

The document as a whole is right or it is an error. Within it each suggestion stands alone: what is not exactly what
was asked for is not taken, and is counted with its reason, so that one slip costs no other suggestion and none is
clamped or dropped quietly.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import ValidationError

from agnitra_lab.contracts.actions import ACTIONS
from agnitra_lab.contracts.base import first_problem
from agnitra_lab.contracts.search import KernelConfig
from agnitra_lab.contracts.suggestion import Rejected, RejectReason, Suggestion
from agnitra_lab.errors import LLMAnswerError
from agnitra_lab.llm import strict_json
from agnitra_lab.redact import redact_text
from agnitra_lab.suggest.answer_schema import ASKED_FIELDS, CHOICE_FIELDS, KERNEL_FIELDS
from agnitra_lab.suggest.budget import CONFIGS_PER_ROUND
from agnitra_lab.suggest.sites import KernelSite

MAX_ANSWER_CHARS = 65_536
MAX_RAW_CHARS = 4_000
MAX_SUGGESTIONS = 16
MAX_MODEL_CHARS = 100

# Part of the seed's record, but facts about the answer: accepted, and replaced by what is known here.
_IGNORED_FIELDS = ("source", "raw_text")
# A value of the right type outside its range; every other problem is one of form.
_RANGE_PROBLEMS = frozenset(
    (
        "greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number", "literal_error",
        "value_error", "string_too_long", "int_parsing_size",
    )
)  # fmt: skip

Kind = Literal["malformed", "out_of_range"]


class InvalidAnswerError(LLMAnswerError):
    """An answer, or one suggestion of it, that cannot be used.

    Attributes:
        kind: "malformed" (not the JSON that was asked for) or "out_of_range" (it is, with a value out of its range).
        reason: why a suggestion was not taken; None for the answer as a whole.
    """

    def __init__(
        self, message: str, *, kind: Kind, reason: RejectReason | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.kind = kind
        self.reason = reason


@dataclass(frozen=True)
class Asked:
    """What an answer may choose from.

    Attributes:
        possible: actions.
        sites: search spaces, whose valid configs are the only ones.
        known: (action or site, what it changes) of everything proposed or measured before.
        configs_per_site: configs that one answer may add to a site.
    """

    possible: Collection[str] = tuple(ACTIONS)
    sites: Sequence[KernelSite] = ()
    known: Collection[tuple[str, str]] = ()
    configs_per_site: int = CONFIGS_PER_ROUND


@dataclass(frozen=True)
class Answer:
    """What was taken of an answer, and what was not.

    Attributes:
        suggestions: in the answer's order; empty when it only repeats what is known.
        rejected: the others.
        num_proposed: both together.
        raw_text: the answer, redacted and cut.
    """

    suggestions: tuple[Suggestion, ...]
    rejected: tuple[Rejected, ...]
    num_proposed: int
    raw_text: str


@dataclass
class _Reader:
    """Reads the suggestions of one answer, in order."""

    asked: Asked
    source: str
    raw_text: str
    taken: dict[tuple[str, str], Suggestion] = field(default_factory=dict)
    num_of_site: Counter[str] = field(default_factory=Counter)

    def read(self, position: int, item: Any) -> None:
        """Take one suggestion.

        Raises:
            InvalidAnswerError: with the reason why it is not taken.
        """
        suggestion = self._suggestion(position, item)
        identity = identity_of(suggestion)
        if identity in self.asked.known or identity in self.taken:
            raise _refuse(f"Suggestion {position} was proposed before: {_quote(' '.join(identity))}.", "repeated")
        if suggestion.site is not None:
            if self.num_of_site[suggestion.site] >= self.asked.configs_per_site:
                raise _refuse(
                    f"Suggestion {position} is one more than the {self.asked.configs_per_site} of a site.", "over_limit"
                )
            self.num_of_site[suggestion.site] += 1
        self.taken[identity] = suggestion

    def _suggestion(self, position: int, item: Any) -> Suggestion:
        if not isinstance(item, dict):
            raise _refuse(f"Suggestion {position} is not an object.", "not_an_object", "malformed")
        expected = {*ASKED_FIELDS, *_IGNORED_FIELDS, *(CHOICE_FIELDS if self.asked.sites else ())}
        unknown = sorted(set(item) - expected)
        if unknown:
            raise _refuse(
                f"Suggestion {position} has unknown keys: {_quote(', '.join(unknown))}.", "unknown_key", "malformed"
            )
        action = item.get("action")
        if isinstance(action, str) and action not in self.asked.possible:
            reason: RejectReason = "not_possible" if action in ACTIONS else "unknown_action"
            raise _refuse(f"Suggestion {position} names {_quote(action)!r}, which is not possible here.", reason)
        site, config = self._choice(position, item)
        fields = {**dict.fromkeys(KERNEL_FIELDS), **{name: item[name] for name in ASKED_FIELDS if name in item}}
        if config is not None and site is not None:
            fields |= {**kernel_fields(config), "template": site.space.template, "site": site.key}
            fields["config"] = config.model_dump()
        if isinstance(fields.get("rationale"), str):
            fields["rationale"] = printable(redact_text(fields["rationale"])).strip()
        return self._validated(position, fields)

    def _choice(self, position: int, item: dict[str, Any]) -> tuple[KernelSite | None, KernelConfig | None]:
        """Look the chosen config up among the valid ones: a rank in the space, never a point of the model's own."""
        named, params = item.get("site"), item.get("params") or None
        candidates = [site for site in self.asked.sites if site.space.template == item.get("action")]
        if not candidates:
            if named is not None or params is not None:
                raise _refuse(f"Suggestion {position} gives a site or params to an action without.", "unknown_site")
            return None, None
        site = next((site for site in candidates if site.key == named), None)
        if site is None and named is None and len(candidates) == 1:
            site = candidates[0]
        if site is None:
            raise _refuse(
                f"Suggestion {position} names no listed site of its action: {_quote(str(named))}.", "unknown_site"
            )
        if not isinstance(params, dict) or not all(type(value) is int for value in params.values()):
            raise _refuse(f"Suggestion {position} has no params of whole numbers.", "outside_space", "malformed")
        key = KernelConfig.model_construct(template=site.space.template, params=params).key()
        if key not in site.valid:
            raise _refuse(
                f"Suggestion {position}: {_quote(key)} is none of the {len(site.valid)} valid configs.", "outside_space"
            )
        return site, site.valid[key]

    def _validated(self, position: int, fields: dict[str, Any]) -> Suggestion:
        try:
            # JSON mode: strictness that knows arrays for tuples, and nothing else that Python would let pass.
            document = json.dumps({**fields, "source": self.source, "raw_text": self.raw_text})
            return Suggestion.model_validate_json(document)
        except ValidationError as error:
            problems = {problem["type"] for problem in error.errors(include_url=False, include_input=False)}
            kind: Kind = "out_of_range" if problems <= _RANGE_PROBLEMS else "malformed"
            problem = _quote(first_problem(error))
            raise _refuse(f"Suggestion {position} is not valid: {problem}.", "bad_field", kind) from None


def parse(text: str, *, model: str, asked: Asked | None = None) -> Answer:
    """Read a model's answer: a JSON object {"suggestions": [...]}, bare or in one ```json fence.

    Args:
        text: the answer, untrusted.
        model: who answered; becomes the source "llm:<model>".
        asked: what it may choose from; every action and no search space by default.

    Returns:
        The suggestions that were taken, in the answer's order, each with the answer as redacted `raw_text`; and the
        others with their reasons.

    Raises:
        InvalidAnswerError: no such document, or not one suggestion that can be taken or is known already.
    """
    asked = asked or Asked()
    try:
        document = strict_json.read(strict_json.unwrap(text), max_chars=MAX_ANSWER_CHARS)
    except LLMAnswerError as error:
        raise InvalidAnswerError(error.message, kind="malformed") from error
    items = _items(document, MAX_SUGGESTIONS + asked.configs_per_site * len(asked.sites))
    source = f"llm:{printable(model)[:MAX_MODEL_CHARS] or 'unnamed'}"
    reader = _Reader(asked, source, redact_text(text)[:MAX_RAW_CHARS])
    refusals: list[tuple[int, InvalidAnswerError]] = []
    for position, item in enumerate(items):
        try:
            reader.read(position, item)
        except InvalidAnswerError as error:
            refusals.append((position, error))
    # A model that agrees with what is known already is no use, and not wrong either.
    if not reader.taken and any(error.reason != "repeated" for _, error in refusals):
        first = refusals[0][1].message
        others = f" (and {len(refusals) - 1} more)" if len(refusals) > 1 else ""
        is_malformed = any(error.kind == "malformed" for _, error in refusals)
        raise InvalidAnswerError(f"{first}{others}", kind="malformed" if is_malformed else "out_of_range")
    rejected = tuple(
        Rejected(position=position, reason=error.reason or "bad_field", detail=error.message)
        for position, error in refusals
    )
    return Answer(tuple(reader.taken.values()), rejected, len(items), reader.raw_text)


def identity_of(suggestion: Suggestion) -> tuple[str, str]:
    """Return what a suggestion would change: two that agree in it are the same one."""
    if suggestion.site is not None and suggestion.config is not None:
        return suggestion.site, suggestion.config.key()
    fields = [getattr(suggestion, name) for name in KERNEL_FIELDS]
    return suggestion.action, "" if fields == [None] * len(fields) else json.dumps(fields)


def kernel_fields(config: KernelConfig) -> dict[str, Any]:
    """Read the seed's kernel fields off a config; null where the template has nothing of the kind."""
    params = config.params
    columns = next((params[name] for name in ("BLOCK_N", "BLOCK_C", "BLOCK_S") if name in params), None)
    rows = next((params[name] for name in ("ROWS_PER_PROGRAM", "BLOCK_M", "BLOCK_S") if name in params), 1)
    block = next((params[name] for name in ("BLOCK_N", "BLOCK_C", "BLOCK_K") if params.get(name, 0) >= 16), None)
    is_block = block is not None and block <= 65536 and not block & (block - 1)
    return {
        "block_size": block if is_block else None,
        "tile_shape": [rows, columns]
        if columns is not None and 1 <= min(rows, columns) <= max(rows, columns) <= 65536
        else None,
        "unroll_factor": None,
        "num_warps": params.get("num_warps") if params.get("num_warps") in (1, 2, 4, 8, 16, 32) else None,
        "num_stages": params.get("num_stages") if 1 <= params.get("num_stages", 0) <= 8 else None,
    }


def _items(document: Any, most: int) -> list[Any]:
    if not isinstance(document, dict) or set(document) != {"suggestions"}:
        raise InvalidAnswerError('The answer must be an object with the one key "suggestions".', kind="malformed")
    items = document["suggestions"]
    if not isinstance(items, list) or not items:
        raise InvalidAnswerError('"suggestions" must be a list with at least one suggestion.', kind="malformed")
    if len(items) > most:
        raise InvalidAnswerError(
            f"The answer holds {len(items)} suggestions; at most {most} are read.", kind="out_of_range"
        )
    return items


def _refuse(message: str, reason: RejectReason, kind: Kind = "out_of_range") -> InvalidAnswerError:
    return InvalidAnswerError(message, kind=kind, reason=reason)


def _quote(text: str) -> str:
    """Return untrusted text as one bounded, printable line."""
    line = printable(redact_text(text))
    return line if len(line) <= 200 else line[:197] + "..."


def printable(text: str) -> str:
    """Drop control and format characters: terminal escapes and right-to-left overrides end up on somebody's screen."""
    spaced = re.sub(r"\s+", " ", text)
    return "".join(character for character in spaced if unicodedata.category(character)[0] != "C")
