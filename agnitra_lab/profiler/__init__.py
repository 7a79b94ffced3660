"""Profile: a `Workload` or a callable -> `Telemetry` (ops, kernels, modules, memory, GPU, the bottleneck's FX node)."""
