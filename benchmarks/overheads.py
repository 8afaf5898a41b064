"""`python -m benchmarks overheads`: what surrounds the kernels. Host time of a call, capture in a CUDA graph, metadata
of a batch, recompilation, and the bare matrix products that a distillation loss is held against.

The rows go to the same files as those of the cases. Mode "host" is wall time of the calling thread, for calls that are
queued without waiting; the other modes are device time.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

import fusedmm
from benchmarks.cases import attention
from benchmarks.harness import why
from benchmarks.results import TIMED, Result, timed
from benchmarks.telemetry import Telemetry
from benchmarks.timing import Times, captured, interleave
from fusedmm import ModalityLayout
from fusedmm.nn import GatedMultimodalAttention

TINY = {"q_lengths": [16] * 8, "k_lengths": [[32] * 4] * 8}  # 1024 keys
CASES = {  # and the mode of their rows
    "overheads/launch": "host",
    "overheads/capture": "forward",
    "overheads/metadata": "forward",
    "overheads/recompile": "host",
    "overheads/matmuls-4096-4096": "both",
}
ROUNDS, CALLS = 15, 40
CHANGES = 5


@dataclass(frozen=True)
class Overheads:
    """Measures every overhead on one device.

    Attributes:
        device: where.
        telemetry: of the device.
        run: id for the results.
        seconds: timing budget of one comparison on the device.
    """

    device: torch.device
    telemetry: Telemetry
    run: str
    seconds: float = 1.0

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def rows(self) -> Iterator[Result]:
        """One row for each comparison and variant; what fails says so in its row."""
        measures = (self.launch, self.capture, self.metadata, self.recompile, self.matmuls)
        for (case, mode), measure in zip(CASES.items(), measures, strict=True):
            blank = Result(self.run, case, mode, "fusedmm", {}, status="failed")
            try:
                yield from measure(blank)
            except Exception as error:
                yield replace(blank, reason=why(error)[1])

    def launch(self, blank: Result) -> Iterator[Result]:
        """Host time of a forward on 1024 keys: the operator, a module around it, and one SDPA call."""
        calls = {"sdpa": self._sdpa(), "fusedmm": self._operator(), "module": self._module()}
        for name, times in host_times(calls, self.device).items():
            yield replace(timed(blank, times), variant=name, sizes={"total_k": 1024})

    def capture(self, blank: Result) -> Iterator[Result]:
        """A module's forward in a CUDA graph: replayed, it must give what the call gives."""
        blank = replace(blank, variant="module")
        if self.device.type != "cuda":
            yield replace(blank, status="skipped", reason="no CUDA device")
            return
        module = self._module()

        def call() -> Tensor:
            with torch.no_grad():
                return module()

        replay = captured(call)
        found = interleave({"module": replay}, self.device, self.seconds, self.telemetry)["module"]
        if not torch.equal(replay(), call()):
            yield replace(blank, status="wrong", reason="a replay gives other numbers than the call")
            return
        yield timed(blank, found)

    def metadata(self, blank: Result) -> Iterator[Result]:
        """Who sees what in a time-causal batch, worked out once a batch, beside the forward that uses it."""
        kind = self.device.type
        shape = attention.Shape(**attention.shapes(kind)["time-causal"])  # type: ignore[arg-type]
        example = shape.example(self.dtype, self.device)
        visibility = example.layout.visibility
        assert visibility is not None
        tensors = example.tensors
        q_lengths, k_lengths = (torch.tensor(x, device=self.device) for x in (shape.q_lengths, shape.k_lengths))
        lengths = ModalityLayout.from_lengths(q_lengths, k_lengths)

        def build() -> ModalityLayout:
            return lengths.at_times(visibility.query_time, visibility.key_time)

        def forward() -> Tensor:
            return fusedmm.gated_multimodal_attention(
                tensors["query"], tensors["key"], tensors["value"], example.layout,
                log_prior=tensors["log_prior"], gate=tensors["gate"],
            ).output  # fmt: skip

        calls = {"metadata": build, "fusedmm": forward}
        with torch.no_grad():
            for call in calls.values():
                call()
            found = interleave(calls, self.device, self.seconds, self.telemetry)
        for name, times in found.items():
            yield replace(timed(blank, times), variant=name)

    def recompile(self, blank: Result) -> Iterator[Result]:
        """Kernels that Triton compiles when lengths and times change; ``compilations`` should be 0."""
        count = 0

        def listen(**_: object) -> None:
            nonlocal count
            count += 1

        was, triton.knobs.compilation.listener = triton.knobs.compilation.listener, listen
        try:
            for step in range(2 + CHANGES):
                if step == 2:  # the first two may compile
                    count = 0
                self._changed(step)
        finally:
            triton.knobs.compilation.listener = was
        done = replace(blank, status=TIMED, median_ms=0.0, p20_ms=0.0, p80_ms=0.0)
        yield replace(done, sizes={"compilations": count, "batches": CHANGES})

    def matmuls(self, blank: Result) -> Iterator[Result]:
        """The four products of a distillation loss at N 8192, V 128256, 4096 wide, without anything around them."""
        rows, classes, width = (8192, 128256, 4096) if self.device.type == "cuda" else (256, 1024, 64)
        hidden, weight = self._normal(rows, width), self._normal(classes, width)
        logits = hidden @ weight.T
        calls = {"cublas": lambda: (hidden @ weight.T, hidden @ weight.T, logits @ weight, logits.T @ hidden)}
        calls["cublas"]()
        found = interleave(calls, self.device, self.seconds, self.telemetry)
        yield replace(timed(blank, found["cublas"]), variant="cublas", sizes={"rows": rows, "classes": classes})

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def _operator(self) -> Callable[[], Tensor]:
        shape = attention.Shape(**TINY, heads=16, kv_heads=16, head_dim=64)  # type: ignore[arg-type]
        example = shape.example(self.dtype, self.device)
        tensors = example.tensors
        arguments = (tensors["query"], tensors["key"], tensors["value"], example.layout)
        factors = {name: tensors[name] for name in ("log_prior", "gate")}
        return lambda: fusedmm.gated_multimodal_attention(*arguments, **factors).output  # type: ignore[arg-type]

    def _module(self) -> Callable[[], Tensor]:
        names = ("text", "audio", "bars", "chart")
        module = GatedMultimodalAttention(256, 4, names).to(self.device, self.dtype)
        query = self._normal(8, 16, 256)
        tokens = {name: self._normal(8, 32, 256) for name in names}
        return lambda: module(query, tokens).output

    def _sdpa(self) -> Callable[[], Tensor]:
        query, key, value = (self._normal(8, 16, length, 64) for length in (16, 128, 128))
        return lambda: F.scaled_dot_product_attention(query, key, value)

    def _changed(self, step: int) -> None:
        """Forward and backward of a batch whose lengths and times no other step has."""
        lengths = attention.mixed(3, (20 + 7 * step, 40 + 9 * step), [(10, 60 + 11 * step)] * 3, 0.2)
        for features in (("log_prior", "gate"), ("log_prior", "gate", "times")):
            shape = attention.Shape(**lengths, heads=2, kv_heads=2, head_dim=64, features=features)  # type: ignore[arg-type]
            example = shape.example(self.dtype, self.device)
            leaves = {
                name: example.tensors[name].detach().requires_grad_()
                for name in ("query", "key", "value", "log_prior", "gate")
            }
            result = fusedmm.gated_multimodal_attention(layout=example.layout, **leaves)  # type: ignore[arg-type]
            result.output.float().sum().backward()


def host_times(calls: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, Times]:
    """Milliseconds of the calling thread a call, in interleaved rounds of calls that do not wait for the device."""
    found = {name: Times() for name in calls}
    with torch.no_grad():
        for _ in range(ROUNDS + 1):
            for name, call in calls.items():
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                began = time.perf_counter()
                for _ in range(CALLS):
                    call()
                found[name].ms.append((time.perf_counter() - began) / CALLS * 1e3)
    for times in found.values():
        times.ms = times.ms[1:]  # the first round warms up
    return found


def table(rows: Sequence[Result]) -> str:
    """For people: one line a row."""
    lines = []
    for row in rows:
        what = f"{row.median_ms:.4f} ms" if row.status == TIMED and row.median_ms else row.reason
        facts = ", ".join(f"{name} {value}" for name, value in row.sizes.items())
        lines.append(f"{row.case:<28}{row.mode:<9}{row.variant:<9}{row.status:<8} {what} {facts}")
    return "\n".join(lines)
