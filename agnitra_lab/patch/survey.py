"""Find out where kernels would go before any is made: the rewrites over the captured graph, with nothing compiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from agnitra_lab.contracts.kernel import KernelSource
from agnitra_lab.contracts.patch import Refusal
from agnitra_lab.contracts.workload import Workload
from agnitra_lab.patch.backend import Backend
from agnitra_lab.patch.install import fresh_entry
from agnitra_lab.patch.rollback import MutableState, run_original


@dataclass(frozen=True)
class Survey:
    """What the rewrites found.

    Attributes:
        actions: those that changed the graph; a template's site is the business of the kernel source.
        refusals: why others did not.
    """

    actions: frozenset[str]
    refusals: tuple[Refusal, ...]


def survey(workload: Workload, actions: Sequence[str], kernels: KernelSource) -> Survey:
    """Rewrite the graphs of one call and throw the result away; `kernels` hears of each site.

    Args:
        workload: runs once, on its own inputs; what it writes is restored.
        actions: what would be patched. Those that measure or merge weights do so here too.
        kernels: asked for each site; what it answers is put into the graph that runs here.

    Returns:
        What would change, and why the rest would not. Of a model that Dynamo cannot trace nothing would.
    """
    backend = Backend(actions, kernels=kernels, is_lowered=False)
    state = MutableState.of(workload)
    try:
        with torch._dynamo.config.patch(backend.dynamo_options):
            run_original(workload, torch.compile(fresh_entry(workload.model), dynamic=False, backend=backend))
    except Exception as error:
        return Survey(frozenset(), (Refusal(action="survey", reason=f"{type(error).__name__}: {str(error)[:200]}"),))
    finally:
        state.restore()
        backend.release()
    return Survey(frozenset(change.action for change in backend.descriptors), tuple(backend.refusals))
