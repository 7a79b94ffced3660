"""Place what training adds: backward ops at their forward nodes, gradients at their parameters, optimisers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from agnitra_lab.profiler.event_table import BACKWARD_PREFIX, EventTable, Int64, Kind
from agnitra_lab.profiler.places import Label, Places
from agnitra_lab.profiler.sweep import Nesting

_ACCUMULATION = f"{BACKWARD_PREFIX}torch::autograd::AccumulateGrad"
_OPTIMIZER_RANGE = "Optimizer."


def place_optimizers(table: EventTable, nesting: Nesting, tops: Int64, places: Places) -> None:
    """Place the ops inside the ranges that torch.optim opens around `step` and `zero_grad`."""
    ranges = table.named(_OPTIMIZER_RANGE) & (table.kind == Kind.ANNOTATION)
    rows = tops[nesting.annotation[tops] >= 0]
    rows = rows[ranges[nesting.annotation[rows]]]
    for name_id in np.unique(table.name[nesting.annotation[rows]]).tolist():
        # "Optimizer.step#AdamW.step"
        what = f"optimizer:{table.names[name_id].partition('#')[2] or table.names[name_id]}"
        mine = rows[table.name[nesting.annotation[rows]] == name_id]
        places.put(mine, "optimizer", "range", label=places.label_id(what, Label(what)), path=-1)


def place_gradients(
    table: EventTable, nesting: Nesting, tops: Int64, places: Places, gradients: Sequence[tuple[int, str]]
) -> None:
    """Place the accumulation of gradients: each at its parameter where a marker names it.

    Source: autograd runs one AccumulateGrad node per parameter, without a sequence number of its own.
    """
    rows = tops[table.named(_ACCUMULATION)[tops]]
    unnamed = rows[nesting.gradient[rows] < 0]
    label = places.label_id("param_grad", Label("param_grad")) if len(unnamed) else -1
    places.put(unnamed, "param_grad", "range", label=label, path=-1)
    for index in np.unique(nesting.gradient[rows]).tolist():
        if 0 <= index < len(gradients):
            name = gradients[index][1]
            what = f"param_grad:{name}"
            mine = rows[nesting.gradient[rows] == index]
            path = places.path_id(name.rpartition(".")[0])
            places.put(mine, "param_grad", "hook", label=places.label_id(what, Label(what)), path=path)


def place_backward(table: EventTable, nesting: Nesting, tops: Int64, places: Places) -> None:
    """Give each backward op the place of the forward op that has the same autograd sequence number.

    An op that makes no autograd node peeks at the number that the next one takes, so of all forward ops with a number
    the last is the one that took it. A backward op whose forward op ran before the profile has no owner.
    """
    is_backward = table.named(BACKWARD_PREFIX)
    rows = tops[is_backward[tops] & ~table.named(_ACCUMULATION)[tops]]
    if not len(rows):
        return
    top = np.maximum(nesting.top_op, 0)
    is_forward = (table.kind == Kind.OP) & (table.sequence >= 0) & (nesting.top_op >= 0) & ~is_backward[top]
    forward = np.flatnonzero(is_forward & ~nesting.is_own)
    forward = forward[np.lexsort((table.start_ns[forward], table.sequence[forward]))]
    wanted = table.sequence[rows]
    place = np.searchsorted(table.sequence[forward], wanted, side="right") - 1
    source = forward[np.maximum(place, 0)] if len(forward) else np.zeros(len(rows), np.int64)
    is_known = (place >= 0) & (wanted >= 0)
    is_known[is_known] = table.sequence[source[is_known]] == wanted[is_known]
    found = rows[is_known]
    places.copy(found, nesting.top_op[source[is_known]])
    exact = np.isin(places.method[found], [Places.method_id("order"), Places.method_id("partial_order")])
    places.method[found[exact]] = Places.method_id("sequence_number")
    places.put(rows[~is_known], None, None, confidence=0.0, path=-1, label=-1)
