"""What distillation accepts, and the plain tensors and numbers that the registered operators take.

Checks read types, shapes and numbers only. What passed them once passes again: of a small problem they would take as
long as the loss.
"""

import math
from collections.abc import Hashable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Partial, Replicate

from fusedmm.eager.products import compute_dtype
from fusedmm.eager.shard import Shard
from fusedmm.heads import Head, LinearHead, Logits, Teacher, TopKLogProbs
from fusedmm.impl import resolve_impl
from fusedmm.ops.autocast import autocast
from fusedmm.ops.signatures import Passed, Signature, signature
from fusedmm.shapes import (
    FLOATS,
    ShapeError,
    as_number,
    check_device,
    check_dtype,
    check_shapes,
    check_tensor,
    check_type,
)

ADVICE = "Wrap it: LinearHead(hidden, weight, bias), or Logits(logits)."
_PASSED: Passed[tuple[Shard, str]] = Passed()


class Inputs(NamedTuple):
    """Checked arguments: local tensors of one dtype a head, the shard of the classes, the temperature as a number and,
    where it differs by row, a tensor; and whether such a call has passed before, which nobody watches then.
    """

    student: Head
    teacher: Teacher
    labels: Tensor | None
    temperature: float
    row_temperature: Tensor | None
    shard: Shard
    impl: str
    has_passed: bool = False

    @property
    def rows(self) -> Tensor:
        """A tensor whose first dimension is the rows, and whose device and dtype are the student's."""
        return self.student.source


def check_inputs(
    op: str,
    student: Head,
    teacher: Teacher,
    labels: Tensor | None,
    temperature: float | Tensor,
    impl: str,
) -> Inputs:
    """Check what a user passed, once for scores and losses.

    Raises:
        TypeError: an argument of a wrong class or dtype.
        ShapeError: sizes that disagree.
        ValueError: a value out of range.
        NotImplementedError: a combination that this implementation has not.
    """
    call = _signature(student, teacher, labels, temperature, impl)
    passed = _PASSED.get(call)
    if passed is not None:
        return Inputs(student, teacher, labels, float(temperature), None, *passed, has_passed=True)
    if not isinstance(student, LinearHead | Logits):
        raise TypeError(
            f"{op}: student must be LinearHead or Logits, got {type(student).__name__}. "
            f"{ADVICE} Its gradient needs the logits of all classes."
        )
    if not isinstance(teacher, LinearHead | Logits | TopKLogProbs):
        raise TypeError(
            f"{op}: teacher must be LinearHead, Logits or TopKLogProbs, got {type(teacher).__name__}. {ADVICE}"
        )
    student, all_classes = _localize(op, "student", student)
    shapes = _head_shapes("student", student)
    if isinstance(teacher, TopKLogProbs):
        shapes["teacher.indices"] = (teacher.indices, ("row", "k"))
        shapes["teacher.log_probs"] = (teacher.log_probs, ("row", "k"))
    else:
        teacher, _ = _localize(op, "teacher", teacher)
        shapes |= _head_shapes("teacher", teacher)
    shapes["labels"] = (labels, ("row",))
    row_temperature = temperature if isinstance(temperature, Tensor) else None
    shapes["temperature"] = (row_temperature, ("row",))
    sizes = check_shapes(op, shapes)
    _check_dtypes(op, student, teacher, labels, row_temperature)
    check_device(op, {argument: tensor for argument, (tensor, _) in shapes.items()})
    _check_temperature(op, temperature)
    shard = _shard(op, student, teacher, sizes, all_classes)
    source = student.source
    resolved = resolve_impl(op, impl, source.device, unsupported=_triton_gaps(student, teacher))
    if resolved != "triton" or source.is_cuda:
        _PASSED.remember(call, (shard, resolved))
    if row_temperature is not None:
        row_temperature = row_temperature.to(compute_dtype(source))
    return Inputs(
        student,
        teacher,
        labels,
        1.0 if isinstance(temperature, Tensor) else float(temperature),
        row_temperature,
        shard,
        resolved,
    )


def _signature(
    student: Head, teacher: Teacher, labels: Tensor | None, temperature: float | Tensor, impl: str
) -> Signature | None:
    """All that the checks look at, of plain heads; None where there is more to do than to check."""
    numbers: list[Hashable] = [temperature, impl]
    tensors: list[Tensor | None] = [labels]
    for head in (student, teacher):
        if type(head) is LinearHead and head.group is None and head.hidden is not None:
            tensors += (head.hidden, head.weight, head.bias)
        elif type(head) is Logits and head.group is None and head.values is not None:
            tensors.append(head.values)
        else:
            return None
        numbers += (type(head) is LinearHead, head.num_classes, head.softcap)
    return signature(tensors, numbers)


def check_fraction(op: str, argument: str, value: float) -> float:
    """A number between 0 and 1, as a float."""
    number = as_number(op, argument, value)
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{op}: {argument} must be between 0 and 1, got {value}.")
    return number


def check_constant(op: str, argument: str, value: Tensor) -> None:
    """Complain with ``ValueError`` about a constant of the loss that wants a gradient."""
    if value.requires_grad:
        raise ValueError(
            f"{op}: {argument} must not require grad, got one that does: it is a constant of the loss. "
            f"Pass {argument}.detach()."
        )


def _head_shapes(role: str, head: Head) -> dict[str, tuple[Tensor | None, tuple[str, ...]]]:
    if isinstance(head, Logits):
        return {f"{role}.values": (head.values, ("row", f"{role}_classes"))}
    return {
        f"{role}.hidden": (head.hidden, ("row", f"{role}_dim")),
        f"{role}.weight": (head.weight, (f"{role}_classes", f"{role}_dim")),
        f"{role}.bias": (head.bias, (f"{role}_classes",)),
    }


def _localize(op: str, role: str, head: Head) -> tuple[Head, int | None]:
    """The head on this rank's own tensors and in the autocast dtype; the classes over all ranks of a DTensor, which
    those may hold unevenly.

    A DTensor without `group` is gathered: its gradient is the sum over ranks, scattered back. With `group` it is the
    shard that this rank has.
    """
    if head.num_classes is not None:
        check_type(op, f"{role}.num_classes", head.num_classes, int, "None counts every row of the weight.")
    if head.group is not None:
        check_type(op, f"{role}.group", head.group, ProcessGroup, "Of a device mesh take mesh.get_group().")
    if head.softcap is not None and not as_number(op, f"{role}.softcap", head.softcap) > 0:
        raise ValueError(f"{op}: {role}.softcap must be positive, got {head.softcap}. Pass None for no bound.")
    check_tensor(op, f"{role}.{'values' if isinstance(head, Logits) else 'hidden'}", head.source)
    if isinstance(head, Logits):
        return head, None
    classes = None
    hidden, weight, bias = head.hidden, head.weight, head.bias
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"{op}: {role}.weight must be a tensor, got {type(weight).__name__}. "
            "Use LinearHead(hidden, linear.weight, linear.bias)."
        )
    if isinstance(hidden, DTensor):
        hidden = hidden.to_local()
    if isinstance(weight, DTensor):
        if head.group is not None:
            classes = weight.shape[0]
        weight, bias = _local(weight, head.group is None), bias if bias is None else _local(bias, head.group is None)
    hidden, weight = autocast(op, **{f"{role}.hidden": hidden, f"{role}.weight": weight})
    if bias is not None:
        (bias,) = autocast(op, **{f"{role}.bias": bias})
    is_same = hidden is head.hidden and weight is head.weight and bias is head.bias
    return head if is_same else replace(head, hidden=hidden, weight=weight, bias=bias), classes


def _local(parameter: Tensor, gather: bool) -> Tensor:
    if not isinstance(parameter, DTensor):
        return parameter
    if not gather:
        return parameter.to_local()
    placements = [Replicate() if placement.is_replicate() else Partial("sum") for placement in parameter.placements]
    return parameter.full_tensor(grad_placements=placements)


def _check_dtypes(op: str, student: Head, teacher: Teacher, labels: Tensor | None, temperature: Tensor | None) -> None:
    for role, head in (("student", student), ("teacher", teacher)):
        if isinstance(head, TopKLogProbs):
            check_tensor(op, f"{role}.indices", head.indices)
            check_tensor(op, f"{role}.log_probs", head.log_probs)
            swapped = head.indices.is_floating_point() and head.log_probs.dtype == torch.int64
            advice = "TopKLogProbs(indices, log_probs)" if swapped else "indices.to(torch.int64)"
            check_dtype(op, f"{role}.indices", head.indices, (torch.int64,), f". Use {advice}.")
            check_dtype(op, f"{role}.log_probs", head.log_probs, FLOATS, ". They are natural logarithms.")
            if head.log_probs.requires_grad:
                raise ValueError(
                    f"{op}: {role}.log_probs must not require grad, got one that does: a top-k teacher is a constant. "
                    "Pass log_probs.detach()."
                )
        elif isinstance(head, Logits):
            check_dtype(op, f"{role}.values", head.values, FLOATS, ".")
        else:
            check_dtype(op, f"{role}.hidden", head.hidden, FLOATS, ".")
            dtype = head.hidden.dtype
            for name, tensor in (("weight", head.weight), ("bias", head.bias)):
                if tensor is not None and tensor.dtype != dtype:
                    is_there = f" while {role}.hidden is {str(dtype).removeprefix('torch.')}"
                    advice = f"{is_there}. Cast one of them, or run under torch.autocast."
                    check_dtype(op, f"{role}.{name}", tensor, (dtype,), advice)
    if labels is not None:
        check_dtype(op, "labels", labels, (torch.int64,), ". Use labels.to(torch.int64).")
    if temperature is not None:
        check_dtype(op, "temperature", temperature, FLOATS, ".")


def _check_temperature(op: str, temperature: float | Tensor) -> None:
    """The value of a number; of a tensor, whose values are not read, that nobody wants its gradient."""
    if isinstance(temperature, Tensor):
        check_constant(op, "temperature", temperature)
    elif not 0 < as_number(op, "temperature", temperature) < math.inf:
        raise ValueError(
            f"{op}: temperature must be positive and finite, got {temperature}. 1.0 leaves the logits as they are."
        )


def _shard(op: str, student: Head, teacher: Teacher, sizes: dict[str, int], all_classes: int | None) -> Shard:
    """This rank's classes after the padding is cut; `all_classes` of a student whose weight is a DTensor."""
    group = student.group
    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    size = sizes["student_classes"] if all_classes is None else -(-all_classes // ranks)
    given = size * ranks if all_classes is None else all_classes
    total = given if student.num_classes is None else student.num_classes
    if isinstance(teacher, TopKLogProbs):
        if sizes["k"] > total:
            raise ShapeError(f"{op}: teacher.indices must hold at most {total} classes, got k={sizes['k']}.")
    else:
        if teacher.group is not group:
            raise ValueError(
                f"{op}: teacher.group must be the group of the student, got another. "
                "Split both heads over the same ranks."
            )
        own = (
            (sizes["teacher_classes"] * ranks if all_classes is None else all_classes)
            if teacher.num_classes is None
            else teacher.num_classes
        )
        if student.num_classes is None:
            total = own if teacher.num_classes is not None else total
        elif teacher.num_classes is None:
            own = total
        if own != total:
            raise ShapeError(
                f"{op}: teacher has {own} classes, but student has {total}. "
                "Pass num_classes to cut a padded vocabulary."
            )
    first = rank * size
    count = min(total - first, sizes["student_classes"])
    if count < 1:
        raise ValueError(
            f"{op}: num_classes must leave every rank a class, got {total} classes, {size} a rank, on rank {rank}. "
            "Use fewer ranks."
        )
    for role in ("student", "teacher"):
        available = sizes.get(f"{role}_classes")
        if available is not None and (available < count or (ranks == 1 and available < total)):
            raise ShapeError(
                f"{op}: num_classes must be at most the classes of {role}, got {total} where {role} has {available} "
                "on this rank. Lower it."
            )
    return Shard(total, first, count, group)


def _triton_gaps(student: Head, teacher: Teacher) -> list[str]:
    """Reasons why no kernel serves these heads; empty where one does."""
    gaps = []
    tensors = [student.source]
    if not isinstance(teacher, TopKLogProbs):
        tensors.append(teacher.source)
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        gaps.append("the kernels compute in float32, the heads are float64")
    return gaps
