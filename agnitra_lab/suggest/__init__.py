"""What to change: TelemetryRecord, WorkloadProfile and DeviceInfo in, a ranked `Proposal` out.

Heuristic presets always answer; a language model, where one is asked, goes in front of them and can only choose from
the closed list of actions.
"""
