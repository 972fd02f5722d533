"""A machine that is the same everywhere, so that what a cost model decides is."""

from conjoin.policy.cost import Machine

MEGABYTE = 2**20

WRITTEN = (
    (2**12, 0.0),
    (31 * MEGABYTE, 3.1e-3),
    (32 * MEGABYTE, 1.3e-2),
    (64 * MEGABYTE, 2.6e-2),
)

NOTHING = ((1, ((1, 0.0), (2, 0.0))), (2, ((1, 0.0), (2, 0.0))))

NONE = ((1, 0.0), (2, 0.0))

HIDDEN = ((2, NOTHING), (4, NOTHING))
"""Beside rows a weight takes its arithmetic and nothing else."""

STEADY = Machine(
    call=4e-6,
    cut=2e-6,
    step=2e-5,
    rate=5e10,
    batched=5e10,
    bandwidth=1e10,
    shared=0.0,
    graph=0.0,
    alias=0.0,
    written=WRITTEN,
    joined=WRITTEN,
    few_rows=HIDDEN,
    convolved=NONE,
    convolved_back=NONE,
)
"""A core and a memory such as are common, with an allocator that asks the system for 32 MiB."""
