"""The torch.compile backend: a workload and accepted actions -> a drop-in model, its patch log, and proof of rollback.

    install(workload, actions) -> Patch: .model (call it), .log() -> PatchLog, .rollback() -> RollbackProof

The original model is never edited: rewrites happen in the graph that Dynamo captures, the drop-in chooses between the
compiled graph and the original at each call, and rollback leaves the original alone in its place.
"""
