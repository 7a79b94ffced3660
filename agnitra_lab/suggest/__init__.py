"""What to change: TelemetryRecord, WorkloadProfile, DeviceInfo and search spaces in, a ranked `Proposal` out.

Presets always answer: `rules` for rewrites, `kernel_rules` for kernel configs. A language model, where one is asked,
goes in front of them; it can only choose from the closed list of actions and among the valid configs of the spaces,
in up to four `rounds` with measured feedback and within a `budget`.
"""
