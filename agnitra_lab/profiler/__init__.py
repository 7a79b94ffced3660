"""Profile: a `Workload`, a callable or a cell -> `Telemetry` (what took the time, down to the graph node).

In the order in which data flows:

    capture      the entry: passes of a workload, or one block of code
    session      one torch.profiler session         markers   module calls on its time line
    observe      wall time, NVML, energy, memory     overhead  what all this cost
    event_table  raw events -> columns               sweep     what is inside what, who launched a kernel
    graphs       root calls -> captured graphs       alignment, backward, regions, replays, inductor
    attribution  every event -> its place            places    owner, method, confidence, module, node
    rows, nodes, hotspots, phases, timeline, idle, memory      places -> tables and pictures
    record       everything -> the telemetry JSON    telemetry, frames, trace, compare         what a user holds
"""
