"""What kernels read of rows, and keep of them in memory: temperatures, labels, and the states of a sweep.

A row's numbers of state lie together, so that their offsets are known to the compiler; between two tiles they wait in
memory, which L1 caches, in place of registers beside the logits.
"""

import triton
import triton.language as tl


@triton.jit
def row_inputs(
    row_temperature_ptr, labels_ptr, first_n, num_rows, inverse_temperature, first_class, num_classes,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """1 / temperature and label of rows [BLOCK_N], labels counted from this rank's first class, -1 for another's."""
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_rows - first_n
    inverse = tl.full([BLOCK_N], 1.0, tl.float32) * inverse_temperature
    if row_temperature_ptr is not None:
        inverse = 1.0 / tl.load(row_temperature_ptr + first_n.to(tl.int64) + offs_n, mask=mask_n, other=1.0)
    labels = tl.full([BLOCK_N], -1, tl.int32)
    if labels_ptr is not None:
        labels = tl.load(labels_ptr + first_n.to(tl.int64) + offs_n, mask=mask_n, other=-1) - first_class
        labels = tl.where((labels >= 0) & (labels < num_classes), labels, -1).to(tl.int32)
    return inverse, labels


@triton.jit
def state_pointers(state_ptr, split, first_n, num_rows, BLOCK_N: tl.constexpr, SIZE: tl.constexpr):
    """Where the states of `SIZE` numbers of rows [BLOCK_N] start, and which rows exist."""
    offs_n = tl.arange(0, BLOCK_N)
    first_row = tl.cast(split, tl.int64) * num_rows + first_n
    return state_ptr + first_row * SIZE + offs_n * SIZE, offs_n < num_rows - first_n


@triton.jit
def store_state(state, state_ptrs, mask_n):
    """Keep a state, a tuple of [BLOCK_N]."""
    for i in tl.static_range(len(state)):
        tl.store(state_ptrs + i, state[i], mask=mask_n)


@triton.jit
def load_state(state_ptrs, mask_n, SIZE: tl.constexpr):
    """The state that was kept; 0 where no row is."""
    first = (tl.load(state_ptrs, mask=mask_n, other=0.0),)
    if SIZE == 1:
        return first
    else:
        return first + load_state(state_ptrs + 1, mask_n, SIZE - 1)
