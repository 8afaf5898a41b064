"""What Triton makes of real launches up to its IR, without a GPU: a program, for a process without the interpreter.

The interpreter takes arguments as they come, and the static table has types that are written down. A launch on a GPU
has neither: an integer of 1 becomes a constant, one past 2^31 an int64, a descriptor or None a type of its own, and a
kernel that is right for other values may not compile for these. Here public calls on CPU tensors go through Triton's
binder and front end for one architecture; what they compute is nothing.

    python -m tests.front_end sm_90

prints the kernels and how many specialisations of each were met, as JSON.
"""

import itertools
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.driver import driver

import fusedmm
import fusedmm.impl
from fusedmm.kernels import launch
from fusedmm.kernels.attention import launch as portable
from fusedmm.kernels.attention import select
from fusedmm.kernels.distillation import gradient, mixture, statistics, top_gradient, top_statistics
from fusedmm.kernels.visibility import visible_ranges

FAR = (1 << 31) + 64  # a stride, in elements
MODULES = (launch, portable, select, gradient, mixture, statistics, top_gradient, top_statistics)


class FrontEnd:
    """Stands in for Triton's compiler: counts what it is asked for, and makes its IR."""

    def __init__(self) -> None:
        self.met: Counter[str] = Counter()

    def __call__(self, source: Any, target: GPUTarget, options: dict[str, Any], **_: Any) -> Any:
        from triton._C.libtriton import ir

        backend = make_backend(target)
        parsed = backend.parse_options({**options, **source.parse_options()})
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        functions, modules = backend.get_codegen_implementation(parsed), backend.get_module_map()
        if not source.make_ir(target, parsed, functions, modules, context).verify():
            raise RuntimeError(f"{source.name}: IR that is not valid")
        self.met[source.name] += 1
        nothing = dict.fromkeys(("function", "packed_metadata"))
        return SimpleNamespace(run=lambda *_: None, launch_metadata=lambda *_: None, **nothing)


def install(arch: str) -> FrontEnd:
    """Make this process launch for an architecture that it has not."""
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    device = SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda _: 0, get_current_target=lambda: target
    )
    driver.set_active(device)
    front_end = FrontEnd()
    triton.compiler.compile = front_end
    fusedmm.impl.interpreting = lambda: True
    for module in MODULES:
        for name, value in (
            ("device_arch", arch),
            ("multiprocessors", 132),
            ("one_hot_dtype", triton.language.bfloat16),
        ):
            if hasattr(module, name):
                setattr(module, name, lambda _, value=value: value)
    return front_end


def attend(softmax: str, q: list[int], k: list[list[int]], heads: tuple[int, int], features: set[str]) -> None:
    """A forward and a backward."""
    layout = fusedmm.ModalityLayout.from_lengths(torch.tensor(q), torch.tensor(k))
    total_q, total_k, modalities = layout.total_q, layout.total_k, layout.num_modalities
    if "times" in features:
        times = torch.arange(total_q), torch.arange(total_k)
        layout = layout.at_times(*times, 3)
        assert layout.visibility is not None
        sizes = layout.cu_seqlens_q, layout.cu_seqlens_k, layout.query_tiles, layout.visibility.ranges
        visible_ranges(*times, layout.visibility.lookback, *sizes, layout.max_seqlen_k)
    query, key, value = (
        stretched(torch.randn(size, number, 64).bfloat16(), "far" in features).requires_grad_()
        for size, number in zip((total_q, total_k, total_k), (heads[0], heads[1], heads[1]), strict=True)
    )
    if softmax == "partials":
        partials = fusedmm.modality_partials(query, key, value, layout, impl="triton")
        (partials.output.sum() + partials.lse.sum()).backward()
        return
    given: dict[str, Any] = {}
    if "gate" in features:
        given["gate"] = torch.randn(total_q, heads[0], modalities, requires_grad=True)
        given["output_gate"] = torch.randn(query.shape).bfloat16().requires_grad_()
        given["active"] = torch.ones(len(q), heads[0], modalities, dtype=torch.bool)
        if softmax == "joint":
            given["log_prior"] = torch.randn(modalities, requires_grad=True)
    if "dropout" in features:
        given["dropout_p"] = 0.1
    if "scale" in features:
        given["scale"] = 1
    result = fusedmm.gated_multimodal_attention(query, key, value, layout, softmax=softmax, impl="triton", **given)
    (result.output.sum() + result.mass.square().sum()).backward()


def stretched(x: Tensor, far: bool) -> Tensor:
    """[row, head, dim], its heads far apart in a sparse file."""
    if not far:
        return x
    rows, heads, dim = x.shape
    with tempfile.NamedTemporaryFile() as file:
        memory = torch.from_file(file.name, shared=True, size=FAR * heads, dtype=x.dtype)
    return memory.as_strided((rows, heads, dim), (dim, FAR, 1))


def distil(rows: int, classes: int, top: int, labels: bool, beta: float) -> None:
    """Scores and both losses; ``top`` classes of a teacher, or with 0 all."""
    student, teacher = (
        fusedmm.LinearHead(*(torch.randn(size, 8).bfloat16().requires_grad_(own) for size in (rows, classes)))
        for own in (True, False)
    )
    if top:
        indices = torch.arange(top).expand(rows, top)
        teacher = fusedmm.TopKLogProbs(indices, torch.full((rows, top), -9.0))
    target = torch.zeros(rows, dtype=torch.int64) if labels else None
    options = {"beta": beta, "temperature": torch.ones(rows) if labels else 1, "impl": "triton"}
    fusedmm.distillation_scores(student, teacher, target, **options)
    for memory in ("fast", "lean"):
        alpha = 0.5 if labels else 1.0
        fusedmm.distillation_loss(student, teacher, target, alpha=alpha, memory=memory, **options).backward()


def calls() -> Iterator[tuple[Any, ...]]:
    """Sizes, strides and numbers of 1 where each may be, and past 2^31."""
    lengths = (([1], [[1]]), ([1], [[20, 9]]), ([1], [[5000, 9000]]), ([129, 2], [[300], [70]]))
    for softmax, (q, k) in itertools.product(("joint", "per_modality", "partials"), lengths):
        yield attend, softmax, q, k, (1, 1), set()
        yield attend, softmax, q, k, (1, 1), {"gate", "times", "scale"}
        yield attend, softmax, q, k, (2, 1), {"gate"}
    for softmax in ("joint", "per_modality"):
        yield attend, softmax, [129, 2], [[300, 1], [0, 70]], (2, 2), {"gate", "dropout", "far"}
        yield attend, softmax, [1], [[5, 9]], (2, 2), {"far"}
    for (rows, classes, top), labels, beta in itertools.product(
        ((1, 1, 0), (1, 300, 0), (129, 2, 0), (1, 1, 1), (1, 300, 1), (129, 40, 3)), (True, False), (0.0, 0.5)
    ):
        yield distil, rows, classes, top, labels, beta


def main(arch: str) -> None:
    """Make every call; an error names the call it comes from."""
    front_end = install(arch)
    for call, *arguments in calls():
        try:
            call(*arguments)
        except Exception as error:
            raise RuntimeError(f"{call.__name__}{tuple(arguments)} for {arch}") from error
    print(json.dumps(front_end.met))


if __name__ == "__main__":
    main(*sys.argv[1:])
