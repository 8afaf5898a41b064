"""How the Hopper kernels are launched: what Triton is asked to compile, what TMA is given to read, how many CTAs."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedmm.testing import AttentionExample, attention_example

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import create_function_from_signature

from fusedmm.kernels.attention.hopper import faint, launch, passes, work
from fusedmm.kernels.attention.hopper.specs import VARIANTS, kernel_specs
from fusedmm.kernels.launch import device_arch
from tests.gluon_launch import hopper_attention, simulate
from tests.operators import WAITS, NoKernel, Operators

SOFTMAXES = ("joint", "per_modality", "partials")
CPU = torch.device("cpu")
TABLE = {spec.name: spec for spec in kernel_specs("sm_90")}
CASES = [
    (softmax, variant)
    for softmax in SOFTMAXES
    for variant in VARIANTS
    if f"attention_hopper_forward[{softmax},{variant},d64,bf16]" in TABLE
]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[passes.Launch]:
    """The launches of Hopper kernels, which are noted and do not run; nor do the others."""
    found: list[passes.Launch] = []
    monkeypatch.setattr(passes.Launch, "run", lambda self: found.append(self))
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(launch, "attention_backward_rows", backward_rows)
    for module in (faint, work):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, NoKernel())
    return found


def backward_rows(
    grad_output: Tensor, grad_mass: None, grad_lse: None, output: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    mass, *_, problem = others
    _, heads, modalities = mass.shape
    terms = mass.new_empty(4, heads, modalities, problem.query_tiles.shape[0] * 128)
    return terms, torch.empty_like(output), problem.output_gate


def draw(
    variant: str, softmax: str, head_dim: int = 64, q_lengths: tuple[int, ...] = (130, 3)
) -> tuple[AttentionExample, Tensor]:
    """A problem of a variant of the table, and a gradient of its output."""
    names, group = VARIANTS[variant]
    refused = {"joint": (), "per_modality": ("log_prior",), "partials": ("log_prior", "gate", "output_gate")}[softmax]
    features = ["times" if name == "visible" else name for name in names if name not in refused]
    lengths = [[5, 40, 1, 7], [3, 0, 2, 1]]
    shape = {"heads": 16, "kv_heads": 16 // group, "head_dim": head_dim, "dtype": torch.bfloat16, "device": CPU}
    example = attention_example(0, q_lengths, lengths, features=features, **shape)
    grad_output = torch.randn(sum(q_lengths), 16, 4, head_dim) if softmax == "partials" else example.grad_output
    return example, grad_output


@pytest.mark.parametrize(("softmax", "variant"), CASES)
def test_what_is_launched_is_what_the_static_table_compiles(
    softmax: str, variant: str, launched: list[passes.Launch]
) -> None:
    """Types, what is known to be a multiple of 16, constants and options: else the table's evidence is of others."""
    example, grad_output = draw(variant, softmax)
    hopper_attention(example, softmax, grad_output, example.grad_mass)
    for each in launched:
        which = each.kernel.fn.__name__.removesuffix("_hopper_kernel").removeprefix("_attention_")
        delta = ",delta" if each.arguments.get("DELTA_ONLY") else ""
        spec = TABLE[f"attention_hopper_{which.removeprefix('backward_')}[{softmax},{variant}{delta},d64,bf16]"]
        backend = CUDABackend(GPUTarget("cuda", 90, 32))
        binder = create_function_from_signature(each.kernel.signature, each.kernel.params, backend)
        arguments, specialised, options = binder(**each.arguments, **each.options)
        expected = {**spec.constexprs, **spec.config.blocks}
        for name, (kind, attribute) in zip(arguments, specialised, strict=True):
            assert kind == spec.signature.get(name, "constexpr"), name
            if kind == "constexpr":
                assert arguments[name] == expected[name], name
            else:
                assert (attribute == "D") == (kind.startswith("*") or name in spec.divisible_by_16), name
        assert options == {k: v for k, v in spec.config.launch_options().items() if k not in spec.config.blocks}


def faults(descriptor: TensorDescriptor) -> Iterator[str]:
    """What cuTensorMapEncodeTiled would refuse, by its documentation."""
    size = descriptor.base.element_size()
    if descriptor.base.data_ptr() % 16:
        yield "address"
    if not all(0 < extent <= 2**32 for extent in descriptor.shape):
        yield "extents"
    if not all(0 <= stride * size < 2**40 and stride * size % 16 == 0 for stride in descriptor.strides[:-1]):
        yield "strides"
    if not all(rows <= 256 for rows in descriptor.block_shape[:-1]):
        yield "box"
    if descriptor.strides[-1] != 1 or len(descriptor.shape) > 5:
        yield "layout"


@pytest.mark.parametrize("softmax", SOFTMAXES)
@pytest.mark.parametrize("head_dim", [16, 24, 72, 96, 128])
def test_tensor_maps_are_ones_that_the_driver_takes(head_dim: int, softmax: str, launched: list[passes.Launch]) -> None:
    """However the tensors lie: at odd addresses, with odd strides, broadcast."""
    example, grad_output = draw("plain", softmax, head_dim)
    tensors = dict(example.tensors)
    for name, x in tensors.items():
        rows, heads, _ = x.shape
        tensors[name] = {
            "query": x.new_empty(x.numel() + 1)[1:].view(x.shape),
            "key": x.new_empty(rows, heads, head_dim + 1)[..., :head_dim],
            "value": x.new_empty(heads, head_dim).expand(rows, heads, head_dim),
        }[name]
    hopper_attention(replace(example, tensors=tensors), softmax, grad_output[:1].expand_as(grad_output), None)
    found = [x for each in launched for x in each.arguments.values() if isinstance(x, TensorDescriptor)]
    assert len(found) > 10
    assert [fault for descriptor in found for fault in faults(descriptor)] == []


@pytest.mark.parametrize("softmax", SOFTMAXES)
def test_nothing_waits_for_the_gpu(softmax: str, launched: list[passes.Launch]) -> None:
    example, grad_output = draw("timed", softmax)
    with Operators() as operators:
        hopper_attention(example, softmax, grad_output, example.grad_mass)
    assert launched
    assert [name for name in operators.names if any(word in name.split("::")[1] for word in WAITS)] == []


@pytest.mark.parametrize(("q_lengths", "programs"), [((130, 3), 48), ((1, 0), 32), ((128 * 9, 1), 132)])
def test_one_program_an_item_and_at_most_one_a_multiprocessor(
    q_lengths: tuple[int, ...], programs: int, launched: list[passes.Launch]
) -> None:
    example, _ = draw("plain", "joint", q_lengths=q_lengths)
    hopper_attention(example, "joint", example.grad_output, None)
    forward, *backward = launched
    assert forward.grid == (programs,) == (forward.arguments["num_programs"],)
    tiles = sum(q_lengths) // 128 + len(q_lengths)
    assert forward.arguments["num_items"] == tiles * 16
    assert [each.grid for each in backward] == [(tiles * 16,), ((59 // 128 + 8) * 16,)]


@pytest.mark.parametrize("softmax", SOFTMAXES)
def test_work_lists_without_any_work(softmax: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything switched off: no partition waits for what never comes, and everything is 0."""
    if device.type == "cuda":
        if device_arch(device) != "sm_90":
            pytest.skip("needs a Hopper GPU, or none")
    else:
        monkeypatch.setattr(launch, "multiprocessors", lambda device: 2)
        monkeypatch.setattr(passes.Launch, "run", lambda self: simulate(self, 0).write_back())
    shape = {"heads": 2, "kv_heads": 1, "head_dim": 64, "dtype": torch.bfloat16, "device": device, "features": ()}
    example = attention_example(0, [130, 3], [[5, 40], [3, 0]], **shape)
    off = torch.zeros(2, 2, 2, dtype=torch.bool, device=device)
    grad_output = torch.randn(133, 2, 2, 64, device=device) if softmax == "partials" else example.grad_output
    example = replace(example, tensors={**example.tensors, "active": off})
    results = hopper_attention(example, softmax, grad_output, example.grad_mass)
    assert torch.isneginf(results.pop("lse")).all()
    assert [name for name, x in results.items() if x.any()] == []
