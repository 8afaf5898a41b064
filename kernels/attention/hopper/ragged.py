"""TMA reads that stop at the end of a sample or segment: rows past it arrive as zeros, whatever lies behind them in
memory.

Packed tensors put the next sample right after a segment. A box that runs over the end would bring its rows along,
and 0 * NaN is NaN: one bad sample would spoil its neighbour. TMA checks bounds only against the shape in the
descriptor, so the descriptor here has two more dimensions whose strides cancel modulo 2^64 and moves the end of the
run to the end of the third: a box past it is filled with zeros by the hardware, at no instruction in the kernel.

Source: ``triton/tools/ragged_tma.py`` (the same arithmetic for plain Triton).
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fusedmm.kernels.attention.hopper.compat import load_tile

END: gl.constexpr = gl.constexpr(1 << 30)  # rows of the bounded dimension
_UNBOUNDED = 0x7FFF0000
_WRAP = 1 << 34  # END * _WRAP elements of 2 or 4 bytes are a multiple of 2^64 bytes


def tile_layout(rows: int, head_block: int, dtype: gl.dtype) -> gl.NVMMASharedLayout:
    """Shared-memory layout of a box of ``rows`` rows of one head, swizzled for wgmma."""
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, 1, head_block], dtype)


def ragged_descriptor(tensor: Tensor, rows: int, head_block: int, dtype: gl.dtype) -> TensorDescriptor:
    """Descriptor of a packed tensor for `load_rows`.

    Args:
        tensor: [row, head, dim]; the last stride is 1, the others multiples of 16 bytes, at most 2^30 rows.
        rows: rows of a box.
        head_block: columns of a box, at least dim; those past dim are zeros.
        dtype: Gluon's name of the element type.
    """
    _, size_heads, head_dim = tensor.shape
    stride_row, stride_head, _ = tensor.stride()
    return TensorDescriptor(
        base=tensor,
        shape=[_UNBOUNDED, _UNBOUNDED, END.value, max(size_heads, 1), head_dim],
        strides=[_WRAP - stride_row, stride_row, stride_row, stride_head, 1],
        block_shape=[1, 1, rows, 1, head_block],
        layout=tile_layout(rows, head_block, dtype),
    )


@gluon.jit
def load_rows(descriptor, row, end, head, barrier, buffer):
    """Start to load a box from ``row`` on of a head; rows at or past ``end`` become zeros.

    The whole box counts on the barrier.
    """
    load_tile(descriptor, [END, end, END - end + row, head, 0], barrier, buffer)
