"""Read Inductor's generated modules: which kernels a compiled graph launches, in order, and for which graph nodes.

The modules say so in comments, so nothing has to be switched on before a model is compiled.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby, pairwise
from pathlib import Path


@dataclass(frozen=True)
class Launch:
    """One launch in a compiled graph's wrapper.

    Attributes:
        name: what the profiler shows as the CPU op: "triton_poi_fused_add_0", "aten::addmm", "cpp_fused_add_0".
        is_triton: whether it is a Triton kernel.
        source_nodes: names of nodes in Dynamo's graph; in a backward module also of the backward graph's own nodes.
            () where the module does not say (C++ kernels).
        aten_ops: such as "aten.addmm".
        computed_nodes: those of `source_nodes` whose arithmetic the launch does. The others it only reads through a
            view, although another launch computed them. All of them where the module does not tell.
        kernel_name: the name of the GPU kernel of a Triton launch, else "".
    """

    name: str
    is_triton: bool
    source_nodes: tuple[str, ...] = ()
    aten_ops: tuple[str, ...] = ()
    computed_nodes: tuple[str, ...] = ()
    kernel_name: str = ""


@dataclass(frozen=True)
class Program:
    """The launches of one generated module, in the order of one call.

    Attributes:
        path_name: the module's file name without its folder.
        launches: in order.
        is_backward: whether it is the backward of a training graph.
    """

    path_name: str
    launches: tuple[Launch, ...]
    is_backward: bool


@dataclass(frozen=True)
class _Kernel:
    """A kernel as its module defines it: what it is made of, and which of its source nodes it only views."""

    is_triton: bool
    kernel_name: str
    sources: tuple[str, ...] = ()
    is_computed: tuple[bool, ...] = ()


_SOURCES = re.compile(r"#.*Source Nodes: \[(.*?)\], Original ATen: \[(.*?)\]")
_MAPPING = re.compile(r"#\s+(\S+) => (.*)")
_FRAGMENT = re.compile(r"#\s+%(\w+) .*?= call_function\[target=([\w.]+)\]")
_DEFINITION = re.compile(r"(\w+) = async_compile\.(\w+)\((?:['\"](\w+)['\"])?")
_FUNCTION = re.compile(r"(\s*)def (\w+)\(")
_ASSIGNED = re.compile(r"[\w\s,()]* = ")
_LAUNCH = re.compile(
    r"(?P<triton>\w+)\.run\("
    r"|extern_kernels\.(?P<extern>\w+)\("
    r"|(?:torch\.ops\.(?P<library>\w+)|(?P<alias>aten|inductor_ops|_quantized))\.(?P<op>\w+)[.(]"
    r"|\w+\.(?P<method>copy_|zero_)\("
    r"|self\.partitions\[(?P<partition>\d+)\]\("
    r"|(?P<function>\w+)\("
)
_LIBRARIES = {"aten": "aten", "inductor_ops": "inductor", "_quantized": "_quantized"}
_EXTERN_OPS = {"_mm_plus_mm": "inductor::_mm_plus_mm", "bias_addmm": "aten::addmm"}
_VIEWS = frozenset({"view", "reshape", "permute", "t", "transpose", "unsqueeze", "squeeze", "expand", "slice", "select",
                    "split", "split_with_sizes", "unbind", "as_strided", "alias", "detach", "getitem"})  # fmt: skip
_MAX_NESTED_CALLS = 8


def read_program(source: str, name: str = "") -> Program:
    """Read the launches of a module that Inductor generated.

    Args:
        source: the module's text; of torch 2.11 to 2.13, partitioned for CUDA graphs or not.
        name: the module's file name.

    Returns:
        The launches in the order of the text. Both branches of a condition are listed, a loop's body once.
    """
    is_backward = re.search(r"^# AOT ID: \['[^']*_backward'\]", source, re.MULTILINE) is not None
    functions, kernels = _read_module(source)
    return Program(name, tuple(_launches("call", functions, kernels, 0)), is_backward)


_read: dict[str, Program | None] = {}


def loaded_programs() -> list[Program]:
    """Read every module that Inductor loaded in this process, each file once.

    Returns:
        One program per file, in the order of loading; [] when Inductor was never imported.
    """
    codecache = sys.modules.get("torch._inductor.codecache")
    modules = list(getattr(getattr(codecache, "PyCodeCache", None), "modules", ()))
    paths = dict.fromkeys(path for module in modules if (path := getattr(module, "__file__", None)))
    # A file's name is the hash of its content, so what was read stays true; what is no longer loaded is forgotten.
    for stale in [path for path in _read if path not in paths]:
        del _read[stale]
    for path in paths:
        if path not in _read:
            _read[path] = _read_file(Path(path))
    return [program for path in paths if (program := _read[path]) is not None]


def _read_file(path: Path) -> Program | None:
    try:
        source = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The kernels' own files are loaded in the same way and launch nothing.
    return read_program(source, path.name) if re.search(r"^\s*def call\(", source, re.MULTILINE) else None


def _read_module(source: str) -> tuple[dict[str, list[str]], dict[str, _Kernel]]:
    """Split a module into the bodies of its functions and its kernels, skipping the kernels' text."""
    functions: dict[str, list[str]] = {}
    kernels: dict[str, _Kernel] = {}
    comments: list[str] = []
    body: list[str] | None = None
    indent, is_quoted = 0, False
    for line in source.splitlines():
        was_quoted = is_quoted
        is_quoted ^= line.count("'''") % 2 == 1
        if was_quoted or not line.strip():
            continue
        if body is not None and len(line) - len(line.lstrip()) > indent:
            body.append(line.strip())
            continue
        body = None
        if line.startswith("#"):
            comments.append(line)
            continue
        if function := _FUNCTION.match(line):
            indent = len(function[1])
            body = functions.setdefault(function[2], [])
        elif definition := _DEFINITION.match(line):
            kernels[definition[1]] = _kernel(definition, comments)
        comments = []
    return functions, kernels


def _kernel(definition: re.Match[str], comments: Iterable[str]) -> _Kernel:
    sources: tuple[str, ...] = ()
    nodes_of: dict[str, list[str]] = {}
    targets: dict[str, str] = {}
    for comment in comments:
        if found := _SOURCES.match(comment):
            sources, nodes_of, targets = _names(found[1]), {}, {}
        elif found := _FRAGMENT.match(comment):
            targets[found[1]] = found[2]
        elif found := _MAPPING.match(comment):
            nodes_of[found[1]] = list(_names(found[2]))
    is_computed = tuple(not all(_is_view(targets.get(node)) for node in nodes_of.get(name, [""])) for name in sources)
    is_triton = definition[2] in ("triton", "multi_kernel")
    return _Kernel(is_triton, (definition[3] or definition[1]) if is_triton else "", sources, is_computed)


def _is_view(target: str | None) -> bool:
    # "torch.ops.aten.reshape.default" or "operator.getitem"; a node without a target is taken for arithmetic.
    return target is not None and not _VIEWS.isdisjoint(target.split(".")[-2:])


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for part in text.split(",") if (name := part.strip()))


def _launches(
    function: str, functions: dict[str, list[str]], kernels: dict[str, _Kernel], depth: int
) -> Iterator[Launch]:
    sources: tuple[str, ...] = ()
    aten_ops: tuple[str, ...] = ()
    for line in functions.get(function, ()):
        if line.startswith("#"):
            if comment := _SOURCES.match(line):
                sources, aten_ops = _names(comment[1]), _names(comment[2])
            continue
        assigned = _ASSIGNED.match(line)
        found = _LAUNCH.match(line, assigned.end() if assigned else 0)
        if found is None:
            continue
        inner = f"partition_{found['partition']}" if found["partition"] else found["function"]
        if inner in functions and inner != "call" and depth < _MAX_NESTED_CALLS:
            yield from _launches(inner, functions, kernels, depth + 1)
        elif (launch := _launch(found, kernels, sources, aten_ops)) is not None:
            yield launch
            # A workspace is cleared for the launch that follows, which the comment is about.
            if found["method"] != "zero_":
                sources, aten_ops = (), ()


def _launch(
    found: re.Match[str], kernels: dict[str, _Kernel], sources: tuple[str, ...], aten_ops: tuple[str, ...]
) -> Launch | None:
    own = found["triton"] or found["function"]
    if own is not None:
        kernel = kernels.get(own)
        if kernel is None:
            return None
        computed = _computed_by_kernel(sources, kernel)
        return Launch(own, kernel.is_triton, sources, aten_ops, computed, kernel.kernel_name)
    if found["partition"]:
        return None
    if found["extern"]:
        name = _EXTERN_OPS.get(found["extern"], f"aten::{found['extern']}")
    elif found["method"]:
        name = f"aten::{found['method']}"
    else:
        name = f"{found['library'] or _LIBRARIES[found['alias']]}::{found['op']}"
    # Nodes are listed in the graph's order and everything else in the list leads to the op, so the op's node is the
    # last. An op that the list does not have (addmm for mm and add) was made of several of them.
    is_one_node = f"{name.replace('::', '.')}" in aten_ops
    return Launch(name, False, sources, aten_ops, sources[-1:] if is_one_node else sources)


def _computed_by_kernel(sources: tuple[str, ...], kernel: _Kernel) -> tuple[str, ...]:
    # Several launches share a kernel: its comment names the nodes of the first, in the same order.
    if len(sources) != len(kernel.sources):
        return sources
    computed = tuple(name for name, is_computed in zip(sources, kernel.is_computed, strict=True) if is_computed)
    return computed or sources


_SILENT_OPS = frozenset({"aten::empty", "aten::empty_strided", "aten::empty_like", "aten::as_strided", "aten::view",
                         "aten::reshape", "aten::resolve_conj", "aten::select", "aten::slice", "aten::detach",
                         "aten::alias", "aten::copy_", "aten::zero_", "aten::fill_", "aten::_foreach_copy_",
                         "aten::to", "aten::set_", "aten::t", "aten::transpose"})  # fmt: skip
"""Ops between a wrapper's launches (allocation, views, copies of inputs) that say nothing about the program."""
_KERNEL_OP = re.compile(r"(triton_|cpp_fused_|\w+::)")
_PREFIX = re.compile(r"^graph_\d+_(?=cpp_)")


def match_ops(op_names: Sequence[str], program: Program) -> list[int | None]:
    """Tie the ops of one call of a compiled graph to its launches, by order and name.

    Args:
        op_names: the direct children of one "## Call CompiledFxGraph" op, in start order.
        program: what that graph launches.

    Returns:
        The launch's place per op; None for an op that is no launch (an allocation, a copy of an input).
    """
    names = [_PREFIX.sub("", name) for name in op_names]
    matches: list[int | None] = [None] * len(names)
    for place, index in _in_order(names, [launch.name for launch in program.launches]):
        matches[place] = index
    return matches


def match_kernels(kernel_names: Sequence[str], program: Program) -> list[tuple[int, ...]]:
    """Tie the kernels of one CUDA graph replay to the launches that were captured.

    Triton kernels carry their launch's name and anchor the rest. What runs between two anchors belongs to the other
    launches between the same two: one by one where their numbers agree (a memset goes with the kernel after it), or
    the kinds of op and kernel tell them apart; else to the whole set.

    Args:
        kernel_names: GPU work of one cudaGraphLaunch in start order, copies and memsets included.
        program: what was captured, in whole or in part.

    Returns:
        Places of launches per kernel: one when it is known exactly, several for a set, () for extra work.
    """
    launches = program.launches
    matches: list[tuple[int, ...]] = [()] * len(kernel_names)
    triton = [index for index, launch in enumerate(launches) if launch.is_triton]
    anchors = [
        (place, triton[index]) for place, index in _in_order(kernel_names, [launches[i].kernel_name for i in triton])
    ]
    for place, index in anchors:
        matches[place] = (index,)
    # Before the first anchor and after the last, a launch beyond the next Triton kernel was not part of the replay.
    first = max((index for index in triton if anchors and index < anchors[0][1]), default=-1)
    last = min((index for index in triton if anchors and index > anchors[-1][1]), default=len(launches))
    bounds = [(-1, first), *anchors, (len(kernel_names), last)]
    known = {launches[index].kernel_name for index in triton}
    for (place, index), (next_place, next_index) in pairwise(bounds):
        externs = [i for i in range(index + 1, next_index) if _is_extern(launches[i])]
        places = [p for p in range(place + 1, next_place) if not _is_triton_kernel(kernel_names[p], known)]
        if externs and places:
            owners = _owners([kernel_names[p] for p in places], [launches[i].name for i in externs])
            for p, owner in zip(places, owners, strict=True):
                matches[p] = tuple(externs[i] for i in owner)
    return matches


def best_program(names: Sequence[str], programs: Iterable[Program], *, is_replay: bool) -> tuple[Program, float] | None:
    """Find the program that a compiled graph's call, or a CUDA graph's replay, ran.

    Args:
        names: the call's op names, or the replay's kernel names, in start order.
        programs: candidates; of equally good ones the last loaded is taken.
        is_replay: whether `names` are kernels. They can only be known by Triton kernels among them.

    Returns:
        The program, and the share of the telling names that it explains in order; None below a half.
    """
    expected = [
        (program, [launch.kernel_name if is_replay else launch.name for launch in program.launches])
        for program in programs
    ]
    expected = [(program, [name for name in wanted if name]) for program, wanted in expected]
    known = {name for _, wanted in expected for name in wanted}
    told = [_PREFIX.sub("", name) for name in names]
    told = [name for name in told if name in known or _is_telling(name, is_replay)]
    best: tuple[float, float, Program] | None = None
    for program, wanted in expected:
        if not told or not wanted:
            continue
        # What both hold, in any order, bounds what agrees in order, at a hundredth of the cost.
        bound = sum((Counter(told) & Counter(wanted)).values()) / len(told)
        if bound < (best[0] if best else 0.5):
            continue
        num_agreeing = sum(1 for _ in _in_order(told, wanted))
        share, use = num_agreeing / len(told), num_agreeing / len(wanted)
        if share >= 0.5 and (best is None or (share, use) >= best[:2]):
            best = (share, use, program)
    return (best[2], best[0]) if best else None


def _is_telling(name: str, is_replay: bool) -> bool:
    if is_replay:
        return name.startswith("triton_")
    return name not in _SILENT_OPS and _KERNEL_OP.match(name) is not None


def _in_order(seen: Sequence[str], wanted: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Pair equal names in order: places in `seen`, places in `wanted`."""
    expected, present = set(wanted), set(seen)
    places = [place for place, name in enumerate(seen) if name in expected]
    # The profiler shows no C++ kernel unless Inductor was told to announce them.
    indices = [index for index, name in enumerate(wanted) if name in present]
    left, right = [seen[place] for place in places], [wanted[index] for index in indices]
    if left == right:
        yield from zip(places, indices, strict=True)
        return
    for block in SequenceMatcher(None, left, right, autojunk=False).get_matching_blocks():
        for offset in range(block.size):
            yield places[block.a + offset], indices[block.b + offset]


_SIDE_WORK = re.compile(r"^(Memset|Memcpy)\b")
_SECOND_HALF = re.compile(r"split_?k_?reduce", re.IGNORECASE)
_KINDS = (
    ("attention", re.compile(r"sdpa|attention|attn|fmha|flash|cudnn::fusion", re.IGNORECASE)),
    ("convolution", re.compile(r"conv|dgrad|wgrad|fprop", re.IGNORECASE)),
    ("product", re.compile(r"nvjet|gemm|gemv|cutlass|cublas|xmma|matmul|linear|mm$", re.IGNORECASE)),
)


def _is_extern(launch: Launch) -> bool:
    return not launch.is_triton and "::" in launch.name


def _is_triton_kernel(name: str, known: set[str]) -> bool:
    return name in known or name.startswith("triton_")


def _kind(name: str) -> str:
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), "other")


def _owners(kernels: Sequence[str], ops: Sequence[str]) -> list[tuple[int, ...]]:
    """Share the kernels between two anchors among the ops between the same anchors."""
    main = [place for place, name in enumerate(kernels) if not _SIDE_WORK.match(name) and not _SECOND_HALF.search(name)]
    shared = _share([kernels[place] for place in main], ops)
    owner_of = dict(zip(main, shared, strict=True))
    everything = tuple(range(len(ops)))
    owners: list[tuple[int, ...]] = []
    for place, name in enumerate(kernels):
        if place in owner_of:
            owners.append(owner_of[place])
        elif _SECOND_HALF.search(name):
            owners.append(owners[-1] if owners else everything)
        else:
            follower = next((owner_of[later] for later in main if later > place), None)
            owners.append(follower or (owners[-1] if owners else everything))
    return owners


def _share(kernels: Sequence[str], ops: Sequence[str]) -> list[tuple[int, ...]]:
    if len(kernels) == len(ops):
        return [(index,) for index in range(len(ops))]
    everything = tuple(range(len(ops)))
    if len(ops) == 1:
        return [everything] * len(kernels)
    kernel_runs = [(kind, len(list(run))) for kind, run in groupby(kernels, key=_kind)]
    op_runs = [(kind, len(list(run))) for kind, run in groupby(ops, key=_kind)]
    if [kind for kind, _ in kernel_runs] != [kind for kind, _ in op_runs]:
        return [everything] * len(kernels)
    owners: list[tuple[int, ...]] = []
    first = 0
    for (_, num_kernels), (_, num_ops) in zip(kernel_runs, op_runs, strict=True):
        run = tuple(range(first, first + num_ops))
        owners += [(index,) for index in run] if num_kernels == num_ops else [run] * num_kernels
        first += num_ops
    return owners
