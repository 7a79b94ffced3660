from __future__ import annotations

import pytest
from report_factory import make_report


@pytest.fixture(
    params=[
        ("cuda", "faster", False),
        ("cpu", "faster", True),
        ("cpu", "no_change", False),
        ("cuda", "slower", False),
        ("cpu", "not_equivalent", True),
    ],
    ids=lambda case: "-".join(str(part) for part in case),
)
def any_report(request):
    device, verdict, has_fallback = request.param
    return make_report(device, verdict, has_fallback=has_fallback)
