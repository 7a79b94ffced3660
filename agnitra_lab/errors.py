"""Every expected failure, typed, with what was given, what was expected and what to do.

AgnitraError                      exit code 1 unless a subclass says otherwise
├── UsageError               (2)  a wrong argument, file, name or input; nothing was run
│   ├── TargetError          (2)  a TARGET string that cannot be resolved or raises
│   └── LedgerError          (2)  a search ledger that is corrupt, foreign or in use; it was not touched
├── MissingError             (3)  a dependency, compiler or device that is needed and absent
├── RunStoreError            (2)  the artifacts folder cannot be written or read
├── LLMError                 (1)  the language model gave no usable answer; a preset takes over
│   ├── LLMTimeoutError
│   ├── LLMRefusalError
│   └── LLMAnswerError
├── CaptureError             (1)  a profile or graph could not be taken
├── SearchError              (1)  a search that cannot go on (empty space, every trial failed)
├── TemplateError            (1)  a kernel template refuses a shape, dtype or config
├── PatchError               (1)  a candidate could not be built
│   └── RollbackError        (1)  the original was not restored bit for bit
└── CheckFailedError         (1)  a guardrail: regression or lost equivalence
"""

from __future__ import annotations


class AgnitraError(Exception):
    """An expected failure: prints in one line, carries a hint and the shell's exit code."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message


class UsageError(AgnitraError):
    """A wrong argument, file, name or input; nothing was run."""

    exit_code = 2


class TargetError(UsageError):
    """A TARGET string that cannot be resolved, or whose function raises."""


class LedgerError(UsageError):
    """A search ledger that is corrupt, belongs to another search, or is in use; it was not touched."""


class MissingError(AgnitraError):
    """A dependency, compiler or device that is needed and absent."""

    exit_code = 3


class RunStoreError(AgnitraError):
    """The artifacts folder cannot be written, or a run in it cannot be read."""

    exit_code = 2


class LLMError(AgnitraError):
    """The language model gave no usable answer."""


class LLMTimeoutError(LLMError):
    """No complete answer within the total deadline."""


class LLMRefusalError(LLMError):
    """The server or the model declined: HTTP error, refusal, empty choice."""


class LLMAnswerError(LLMError):
    """An answer that is not the JSON that was asked for, or is out of range."""


class CaptureError(AgnitraError):
    """A profile or graph could not be taken."""


class SearchError(AgnitraError):
    """A search that cannot go on."""


class TemplateError(AgnitraError):
    """A kernel template refuses a shape, dtype, device or config."""


class PatchError(AgnitraError):
    """A candidate could not be built or installed."""


class RollbackError(PatchError):
    """The original was not restored bit for bit."""


class CheckFailedError(AgnitraError):
    """A guardrail failed: a regression, or outputs that are no longer equivalent."""
