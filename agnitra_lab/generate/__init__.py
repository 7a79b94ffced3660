"""Make a `KernelConfig` concrete: Triton source, callable and content hash (KernelConfig -> Kernel).

registry.py    the table of templates, and whether this machine can run them
templates/     one kernel family per file: kernel, launch, space, reference, supports
defaults.py    the config to start from, by rule, before anything was measured
render.py      config -> Kernel
"""
