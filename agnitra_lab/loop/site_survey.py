"""Where kernels would go in a graph, asked of the rewrites themselves before anything is compiled."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from agnitra_lab.contracts.actions import ACTIONS
from agnitra_lab.contracts.kernel import Launch, Site
from agnitra_lab.contracts.workload import Workload
from agnitra_lab.generate.kernels import KernelBook
from agnitra_lab.generate.registry import is_available as why_no_kernels
from agnitra_lab.patch.survey import survey
from agnitra_lab.profiler import graphs


@dataclass(frozen=True)
class SiteSurvey:
    """What was found.

    Attributes:
        findable: actions that would change something, and templates that have a site.
        sites: what there is with all changes made, most frequent first, then what there is besides without some.
        standing: those that there are with all changes made; empty where no kernel runs.
        launches: how their kernels are called.
    """

    findable: frozenset[str] = frozenset()
    sites: tuple[Site, ...] = ()
    standing: frozenset[Site] = frozenset()
    launches: tuple[Launch, ...] = ()

    def apart(self, asked: Collection[str]) -> frozenset[Site]:
        """Return the sites that are gone once all changes are made: only candidates with fewer have them.

        A norm before a product is a site of its own as long as no rewrite takes both.

        Args:
            asked: the actions that will be tried; without one of the templates that stand, nothing is known.
        """
        is_whole = bool(self.standing) and {site.template for site in self.standing} <= set(asked)
        return frozenset(self.sites) - self.standing if is_whole else frozenset()


def find_sites(workload: Workload, device: torch.device) -> SiteSurvey:
    """Let the rewrites loose on the graphs of one call, and keep what Dynamo traced for later profiles of the model.

    Args:
        workload: runs once, on its own inputs; what it writes is restored.
        device: where it runs.
    """
    has_kernels = why_no_kernels() is None
    alone, together = KernelBook(is_survey=True), KernelBook()
    tried = [name for name, action in ACTIONS.items() if action.kind != "options" and not action.is_measured]
    found = survey(
        workload, [name for name in tried if _is_possible(name, device)], alone,
        together=together if has_kernels else None,
    )  # fmt: skip
    if found.graph is not None and isinstance(workload.model, nn.Module):
        graphs.remember(workload.model, workload.args, workload.kwargs, found.graph)
    ranked = [site for sites in (together.sites, alone.sites) for site, _ in sites.most_common()]
    if not has_kernels:
        # A replay answers for the nearest recorded shape: one site a template says all that it can.
        ranked = list({site.template: site for site in reversed(ranked)}.values())
    return SiteSurvey(
        found.actions | {site.template for site in alone.sites},
        tuple(dict.fromkeys(ranked)),
        frozenset(together.sites),
        found.launches,
    )


def _is_possible(action: str, device: torch.device) -> bool:
    # Where no kernel runs, templates are surveyed for the replay of their recordings all the same.
    return device.type == "cuda" or not ACTIONS[action].needs_cuda or ACTIONS[action].kind == "template"
