"""Gluon's names that changed between Triton 3.6, 3.7 and 3.9, under one name each: everything else imports them from
here.

| here | 3.6 | 3.7 | 3.9 |
|---|---|---|---|
| `load_tile` | ``tma.async_copy_global_to_shared`` | the same | ``tma.async_load`` |
| `partition_barrier` | ``gl.thread_barrier`` | ``gl.barrier`` | ``gl.barrier`` |
"""

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
partition_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
