"""Fixtures: install a candidate on the CPU without Inductor, which the lowered tests cover."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from patch_models import formula_kernels, workload

from agnitra_lab.patch.install import Patch, install


@pytest.fixture
def patched() -> Iterator[Callable[..., Patch]]:
    def make(model: Any, actions: Any, *args: Any, **kwargs: Any) -> Patch:
        names = [actions] if isinstance(actions, str) else list(actions)
        target = workload(model, *args, **kwargs)
        return install(target, names, name="candidate", kernels=formula_kernels(), is_lowered=False)

    yield make
    torch._dynamo.reset()
