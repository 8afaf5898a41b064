"""Tiles over the keys of a sample whatever their modalities: which key stands in which column, and what is one number
a modality spread over the pairs of a tile.

A program reads, of each modality, the keys that some of its rows see; of an inactive segment, none. Laid end to end
they are its columns, so that a tile of BLOCK_K columns starves only at the end of the sample, and what is not read
takes no column. The tile's ``one_hot`` [BLOCK_M, BLOCK_K] says which modality a column belongs to, and products with
it go both ways:

    to pairs:       x_i,m(j)            = (x one_hot)_ij
    to modalities:  sum_{j in m} y_ij   = (y one_hot^T)_im

Tensor cores multiply numbers of 16 bits. A float32 is the sum of three bfloat16 of 8 bits each, and a product with 0 or
1 is exact, so what is in ``parts`` products loses nothing (3) or 2^-16 of itself (2). BLOCK_M is at least the 16 that
one instruction multiplies: a part costs a tile as much as 16 more columns of a head.
"""

import triton
import triton.language as tl

from fusedmm.kernels.indexing import visible_range

HIDDEN = tl.constexpr(-1e30)  # in place of -inf, which times 0 is NaN


@triton.jit
def lay_out_keys(ranges_ptr, ranges_stride_m, is_hidden, low, high, mask, num_modalities):
    """[BLOCK_M] first column and end of each modality, and what a column adds to become a key; all columns.

    ``low : high`` [BLOCK_Q, BLOCK_M] is what each row of ``mask`` sees, or None; what ``is_hidden`` [BLOCK_M] has none.
    """
    offs_m = tl.arange(0, is_hidden.shape[0])
    start = tl.load(ranges_ptr + offs_m * ranges_stride_m, mask=offs_m < num_modalities, other=0)
    stop = tl.load(ranges_ptr + offs_m * ranges_stride_m + 1, mask=offs_m < num_modalities, other=0)
    if low is not None:
        start, stop, _, _ = visible_range(start, stop, low, high, mask)
    count = tl.where(is_hidden, 0, stop - start)
    column_stop = tl.cumsum(count, 0)
    column_start = column_stop - count
    # Over the rows too, so across warps: ptxas then takes the bound of the loop for the same in all lanes and keeps its
    # addresses in uniform registers (dQ at D 64 on sm_90: 468 instructions without, 400 with).
    columns = tl.max(tl.where(mask, column_stop[None, :], 0))
    return column_start, column_stop, start - column_start, columns


@triton.jit
def find_keys(offs_c, column_start, column_stop, key_shift, ONE_HOT: tl.constexpr):
    """one_hot [BLOCK_M, BLOCK_K] of columns in a dtype, and the key [BLOCK_K] that stands in each."""
    is_modality = (offs_c[None, :] >= column_start[:, None]) & (offs_c[None, :] < column_stop[:, None])
    offs_k = offs_c + tl.sum(tl.where(is_modality, key_shift[:, None], 0), 0)
    return is_modality.to(ONE_HOT), offs_k


@triton.jit
def gather_rows(base_ptr, row_stride, offs, mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D] rows ``offs`` of a matrix whose last stride is 1; 0 where masked and past HEAD_DIM."""
    offs_d = tl.arange(0, BLOCK_D)
    mask = mask[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (offs_d < HEAD_DIM)[None, :]
    return tl.load(base_ptr + offs.to(tl.int64)[:, None] * row_stride + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def add_product(total, x, one_hot, PARTS: tl.constexpr):
    """``total + x @ one_hot`` of a float32 ``x``, whose rest after so many parts is left out."""
    for _ in tl.static_range(PARTS - 1 if one_hot.dtype != tl.float32 else 0):
        # The upper half of a float32 is a bfloat16: cut off rather than rounded, it takes one instruction.
        head = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        total = tl.dot(head.to(one_hot.dtype), one_hot, total, input_precision="ieee")
        x -= head
    return tl.dot(x.to(one_hot.dtype), one_hot, total, input_precision="ieee")


@triton.jit
def spread(x, one_hot, PARTS: tl.constexpr):
    """[BLOCK_Q, BLOCK_K] for each pair the number that ``x`` [BLOCK_Q, BLOCK_M] has for its query and modality."""
    return add_product(tl.zeros([x.shape[0], one_hot.shape[1]], tl.float32), x, one_hot, PARTS)


@triton.jit
def sees_columns(low, high, first_column, one_hot):
    """[BLOCK_Q, BLOCK_K] whether a column lies in its modality's ``low : high`` [BLOCK_Q, BLOCK_M], in columns."""
    column = (first_column + tl.arange(0, one_hot.shape[1])).to(tl.float32)[None, :]
    return (column >= spread(low, one_hot, 3)) & (column < spread(high, one_hot, 3))
