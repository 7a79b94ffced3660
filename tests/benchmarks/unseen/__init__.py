"""Workloads that the optimiser was not made for: what it gains on a model that nobody looked at while writing it.

The suite of `agnitra_lab.workloads` is what rewrites and templates were written against, so its figures say how well
the optimiser does on known ground. These models say what is left elsewhere: other families, other layers, other
spellings of the same layer. Nothing in `agnitra_lab` may be tuned on them: no rewrite, template, search space or
threshold is added because of a result here. A failure found here (a wrong output, a crash, a slowdown) is mended for
its cause, with a test of its own elsewhere.

Each module is a part of the set and each public function without arguments is a workload: full size on a CUDA device,
tiny and in fp32 on a CPU (`sizes.py` decides). They run by the same command as the suite, in any number:

    agnitra suite run tests/benchmarks/unseen/language.py:gemma2_prefill
    agnitra suite run $(python tests/benchmarks/unseen/targets.py language)
    agnitra suite run $(python tests/benchmarks/unseen/targets.py)

Layers, chains and networks are of the kinds of KernelBench (Ouyang et al. 2025), levels 1 to 3; all are written in
plain torch from the papers that their docstrings name, but for those of `published`, which are the models of
transformers and timm themselves and need these packages.
"""
