"""A fault in the barrier protocol of a Hopper kernel does not pass the Gluon simulator unseen.

Every barrier operation of every partition is broken in turn, in the kernels' own source: a parity flipped, a wait, an
arrival or an expected byte count left out, an arrival repeated or made before the products that read the buffer are
waited for, a product waited for too late. The simulator must object to each; the kernels as they are must pass, with
the same bits under every schedule.
"""

import ast
import types
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from fusedmm.testing import attention_example

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("needs Triton's interpreter for the work lists; ci/check runs it", allow_module_level=True)
from fusedmm.kernels.attention.hopper import backward_key_value, backward_query, forward, launch, passes
from tests.gluon_launch import Memory, hopper_attention, simulate

# A fault is only seen where another use of the buffer follows: more tiles than the rings have slots, several items a
# CTA, two of them without keys, two segments.
LENGTHS = ([300, 3, 70, 2], [[140, 400], [0, 0], [5, 160], [0, 0]])
PARTITIONS = {
    "forward joint": (forward, "_joint_consumer"),
    "forward partials": (forward, "separate_consumer"),
    "forward producer": (forward, "_forward_producer"),
    "query partials": (backward_query, "_query_consumer"),
    "query producer": (backward_query, "_query_producer"),
    "key_value": (backward_key_value, "_key_value_consumer"),
    "key_value producer": (backward_key_value, "_key_value_producer"),
}
SEEDS = 3
HARMLESS = {
    # passed already: the wait is there for ptxas alone
    "query partials": {"wait dropped: mbarrier.wait(full.index(slot), phase)"},
    "key_value": {"wait dropped: mbarrier.wait(full.index(slot), phase)"},
    # the next copy of keys comes after one of values, whose buffer is released after these keys were read
    "forward joint": {"arrive early: mbarrier.arrive(key_empty.index(slot), count=1)"},
    "forward partials": {"arrive early: mbarrier.arrive(key_empty.index(slot), count=1)"},
}


def launches(softmax: str, monkeypatch: pytest.MonkeyPatch) -> list[passes.Launch]:
    """The launches of one forward and backward, their tensors as the last of them leaves them."""
    found: list[passes.Launch] = []

    def run(launched: passes.Launch) -> None:
        simulate(launched, 0).write_back()
        found.append(launched)

    monkeypatch.setattr(passes.Launch, "run", run)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 1)
    cpu = torch.device("cpu")
    example = attention_example(
        0, *LENGTHS, heads=1, kv_heads=1, head_dim=64, dtype=torch.bfloat16, device=cpu, features=()
    )
    grad_output = torch.randn(sum(LENGTHS[0]), 1, 2, 64) if softmax == "partials" else example.grad_output
    hopper_attention(example, softmax, grad_output, example.grad_mass)
    return found


def bits(memory: Memory) -> list[bytes]:
    return [array.tobytes() for _, array in memory.storages.values()]


class Breaker(ast.NodeTransformer):
    """Breaks one operation of a function, the one with the number ``target`` among those that ``fault`` can break."""

    def __init__(self, fault: str, target: int) -> None:
        self.fault, self.target, self.seen, self.line = fault, target, 0, ""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for name, body in ast.iter_fields(node):
            if isinstance(body, list) and body and isinstance(body[0], ast.stmt):
                setattr(node, name, self._statements(body))
        return super().generic_visit(node)

    def _statements(self, body: list[ast.stmt]) -> list[ast.stmt]:
        result: list[ast.stmt] = []
        for statement in body:
            name = called(statement)
            operation, _, how = self.fault.partition(" ")
            if name != operation or not (how != "early" or any(called(s) == "warpgroup_mma_wait" for s in result)):
                result.append(statement)
                continue
            self.seen += 1
            if self.seen != self.target + 1:
                result.append(statement)
                continue
            self.line = ast.unparse(statement)
            self._break(statement, how, result)
        return result

    def _break(self, statement: Any, how: str, result: list[ast.stmt]) -> None:
        call = statement.value
        match how:
            case "dropped":
                result.append(ast.Pass())
            case "flipped":
                call.args[1] = ast.BinOp(call.args[1], ast.BitXor(), ast.Constant(1))
                result.append(statement)
            case "halved":
                call.args[1] = ast.BinOp(call.args[1], ast.FloorDiv(), ast.Constant(2))
                result.append(statement)
            case "repeated":
                result += [statement, statement]
            case "early":
                place = max(i for i, s in enumerate(result) if called(s) == "warpgroup_mma_wait")
                result.insert(place, statement)
            case "late":
                call.args[0] = ast.BinOp(call.args[0], ast.Add(), ast.Constant(1))
                result.append(statement)


def called(statement: ast.stmt) -> str:
    """Name of the function that a statement calls and does nothing else with, or that it assigns the result of."""
    call = getattr(statement, "value", None)
    return getattr(call.func, "attr", getattr(call.func, "id", "")) if isinstance(call, ast.Call) else ""


FAULTS = (
    *("wait flipped", "wait dropped", "arrive dropped", "arrive repeated", "arrive early"),
    *("expect dropped", "expect halved", "warpgroup_mma_wait late"),
)


def mutants(module: types.ModuleType, name: str) -> Iterator[tuple[str, Any]]:
    """Every way to break a partition of a kernel once: what was broken, and what stands in for the partition."""
    kernel = getattr(module, name)
    for fault in FAULTS:
        target = 0
        while True:
            breaker = Breaker(fault, target)
            tree = ast.fix_missing_locations(breaker.visit(ast.parse(kernel.src)))
            if not breaker.line:
                break
            yield f"{fault}: {breaker.line}", rebuilt(kernel, tree)
            target += 1


def rebuilt(kernel: Any, tree: ast.Module) -> Any:
    """A kernel, as far as the simulator looks at it, from other source."""
    scope = dict(kernel.fn.__globals__)
    exec(compile(tree, kernel.fn.__code__.co_filename, "exec"), scope)
    function = scope[kernel.fn.__name__]
    return types.SimpleNamespace(fn=function, arg_names=kernel.arg_names, params=kernel.params)


def objection(launched: passes.Launch, truth: list[bytes]) -> str | None:
    """What the simulator says against a launch, over a few schedules; None: nothing."""
    for seed in range(SEEDS):
        try:
            if bits(simulate(launched, seed)) != truth:
                return "wrong numbers"
        except (RuntimeError, AttributeError) as error:
            return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.slow
@pytest.mark.parametrize("partition", PARTITIONS)
def test_every_broken_barrier_is_seen(partition: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name = PARTITIONS[partition]
    place = {"forward": 0, "query": 1, "key_value": 2}[partition.split()[0]]
    softmax = "partials" if "partials" in partition or partition.startswith("query") else "joint"
    launched = launches(softmax, monkeypatch)[place]
    truth = bits(simulate(launched, 0))
    assert [bits(simulate(launched, seed)) == truth for seed in (1, 2)] == [True, True]
    unseen = []
    count = 0
    for label, mutant in mutants(module, name):
        count += 1
        with monkeypatch.context() as patch:
            patch.setattr(module, name, mutant)
            said = objection(launched, truth)
        if said is None:
            unseen.append(label)
        print(f"{partition}: {label}: {said}")
    assert count >= 6
    assert sorted(unseen) == sorted(HARMLESS.get(partition, ()))


def test_clean_partitions_are_what_the_mutants_start_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unbroken source, taken apart and put together again, gives the kernel's own bits."""
    launched = launches("joint", monkeypatch)[0]
    truth = bits(simulate(launched, 0))
    kernel = forward._joint_consumer
    monkeypatch.setattr(forward, "_joint_consumer", rebuilt(kernel, ast.parse(kernel.src)))
    assert bits(simulate(launched, 0)) == truth


def test_barriers_that_copies_may_not_see_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel without the fence behind the initialisation of its barriers."""
    for launched in launches("joint", monkeypatch):
        breaker = Breaker("fence_async_shared dropped", 0)
        tree = ast.fix_missing_locations(breaker.visit(ast.parse(launched.kernel.src)))
        assert breaker.line == "fence_async_shared()"
        with pytest.raises(RuntimeError, match="no fence"):
            simulate(replace(launched, kernel=rebuilt(launched.kernel, tree)), 0)
