"""Programs of one launch that wait for each other. No template itself.

Whoever waits must have taken its number from a counter, so that all it waits for have begun: then they finish as soon
as they fit on the device at once, whatever the order in which it starts them.

Source: the tickets are those of Merrill and Garland, "Single-pass Parallel Prefix Scan with Decoupled Look-back", 2016,
section 4.4; waiting as in Inductor's cooperative reductions.
"""

import triton
import triton.language as tl


@triton.jit
def arrive(count_ptr):
    """Count this program in, after all that its threads have stored."""
    tl.debug_barrier()
    tl.atomic_add(count_ptr, 1, sem="release")


@triton.jit
def wait_for(count_ptr, NUM: tl.constexpr):
    """Wait until NUM programs have arrived, before any thread loads what they stored."""
    arrived = 0
    while arrived < NUM:
        arrived = tl.atomic_add(count_ptr, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def wait_for_all(count_ptr, NUM: tl.constexpr):
    """Arrive at a counter, and wait until NUM programs have."""
    arrive(count_ptr)
    wait_for(count_ptr, NUM)
