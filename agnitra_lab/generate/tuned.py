"""Configs that searches found, kept on disk, so that a second run on this machine starts where the first one ended.

    <folder>/<device>.jsonl    one line a finding, appended: site, config, latency, and what it was measured with

A finding counts only for the same device, versions and kernel source: a new driver or an edited kernel is searched
again. A shape that was never searched takes the finding of its bucket (the first number rounded up to a power of two).
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from agnitra_lab.contracts.kernel import Site
from agnitra_lab.contracts.search import KernelConfig
from agnitra_lab.generate import registry
from agnitra_lab.generate.points import next_power_of_two

FOLDER_VARIABLE = "AGNITRA_CACHE_DIR"


def default_folder() -> Path:
    """Return the folder of the user's findings: AGNITRA_CACHE_DIR, else below the cache folder of the platform."""
    given = os.environ.get(FOLDER_VARIABLE)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else cache / "agnitra_lab"


def bucket(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that stands for all shapes tuned together: rows in powers of two, the rest as it is."""
    return (next_power_of_two(shape[0]), *shape[1:]) if shape else shape


class TunedConfigs:
    """The findings of one device with one set of versions.

    Args:
        folder: where the file lies; it need not exist.
        device: the device's name.
        versions: of torch, triton and the driver.

    Attributes:
        num_unreadable: lines that were skipped; they stay in the file.
    """

    def __init__(self, folder: Path, device: str, versions: Mapping[str, str]) -> None:
        self.path = folder / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.jsonl"
        self._versions = dict(sorted(versions.items()))
        self.num_unreadable = 0
        self._exact: dict[Site, KernelConfig] = {}
        self._of_bucket: dict[Site, KernelConfig] = {}
        self._unsearched: set[Site] = set()
        self._outdone: set[Site] = set()
        for site, config, is_searched, is_outdone in self._findings():
            self._remember(site, config, is_searched=is_searched, is_outdone=is_outdone)

    def get(self, site: Site) -> KernelConfig | None:
        """Return the config found for a site, or for its bucket where that is valid here; None for neither."""
        if site in self._exact:
            return self._exact[site]
        config = self._of_bucket.get(_bucket_of(site))
        return (
            config if config is not None and config in registry.load(site.template).space(*_key(site)).configs else None
        )

    def is_searched(self, site: Site) -> bool:
        """Whether `get` answers with what a search chose, and not with the rule of thumb that was merely measured."""
        return site not in self._unsearched and self.get(site) is not None

    def is_outdone(self, site: Site) -> bool:
        """Whether a library was faster than the config that `get` answers with."""
        return (site if site in self._exact else _bucket_of(site)) in self._outdone

    def add(
        self, site: Site, config: KernelConfig, latency_ms: float, *, is_searched: bool = True, is_outdone: bool = False
    ) -> None:
        """Keep a finding. A folder that cannot be written costs the next run its search, and nothing else.

        Args:
            site: where.
            config: what was found.
            latency_ms: what it took.
            is_searched: False where nothing else was tried; such a finding is the site's own, and not its bucket's.
            is_outdone: a library does the same in less.
        """
        self._remember(site, config, is_searched=is_searched, is_outdone=is_outdone)
        row = {
            "site": site.key(), "params": config.params, "latency_us": round(latency_ms * 1e3, 4),
            "versions": self._versions, "kernel": kernel_sha256(site.template), "is_searched": is_searched,
            "is_outdone": is_outdone,
        }  # fmt: skip
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # One write of one line: two processes that append at once leave two whole lines.
            with self.path.open("a") as file:
                file.write(json.dumps(row, sort_keys=True) + "\n")

    def _remember(self, site: Site, config: KernelConfig, *, is_searched: bool, is_outdone: bool) -> None:
        self._exact[site] = config
        for place in (site, _bucket_of(site)) if is_searched else (site,):
            (self._outdone.add if is_outdone else self._outdone.discard)(place)
        if is_searched:
            self._of_bucket[_bucket_of(site)] = config
            self._unsearched.discard(site)
        else:
            self._unsearched.add(site)

    def _findings(self) -> Iterator[tuple[Site, KernelConfig, bool, bool]]:
        with contextlib.suppress(OSError):
            for line in self.path.read_text(errors="replace").splitlines():
                try:
                    yield from self._read(json.loads(line))
                except (ValueError, KeyError, TypeError, AttributeError):
                    self.num_unreadable += 1

    def _read(self, row: dict[str, Any]) -> Iterator[tuple[Site, KernelConfig, bool, bool]]:
        site = Site.of_key(row["site"])
        if row["versions"] != self._versions or site.template not in registry.TEMPLATES:
            return
        config = KernelConfig(template=site.template, params=row["params"])
        is_current = row["kernel"] == kernel_sha256(site.template)
        if is_current and config in registry.load(site.template).space(*_key(site)).configs:
            yield site, config, row.get("is_searched", True) is True, row.get("is_outdone", False) is True


def kernel_sha256(template: str) -> str:
    """Return the sha256 of a template's Triton source."""
    kernel = registry.load(template).kernel
    functions = kernel if isinstance(kernel, tuple) else (kernel,)
    return hashlib.sha256("".join(inspect.getsource(function.fn) for function in functions).encode()).hexdigest()


def _key(site: Site) -> tuple[tuple[int, ...], str]:
    return site.shape, site.dtype


def _bucket_of(site: Site) -> Site:
    return Site(site.template, bucket(site.shape), site.dtype)
