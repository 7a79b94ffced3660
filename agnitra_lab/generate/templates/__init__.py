"""One Triton kernel family per file, each with five public names: kernel, launch, space, reference, supports.

`launch` and `reference` take the tensors; `space` enumerates the valid configs of a shape; `supports` says in words why
a call must keep its original ops. The op behind `launch` is registered with torch once, when the file is imported.
"""
