"""A trainer's step: the forecaster of a recipe on a simulated market, loss and gradients of all parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

import fusedmm.flops  # noqa: F401  registers the formulas
from benchmarks.case import Case, Prepared, Variant
from benchmarks.results import ROOT
from fusedmm.nn import GatedMultimodalAttention

SEED = 0
RECIPE = ROOT / "recipes" / "demo.toml"
BATCH = {"cpu": 64, "cuda": 512}
SMALL_BATCH = 8
# Wide enough on a GPU to be more than launches.
MODEL: dict[str, list[str]] = {"cpu": [], "cuda": ["model.dim=512", "model.heads=8", "model.latents=8"]}


@dataclass(frozen=True)
class Problem:
    """A batch on its device, and how to make the model."""

    task: Any
    recipe: Any
    batch: Any
    dtype: torch.dtype

    def model(self, impl: str) -> nn.Module:
        """The forecaster of the gated variant, with the same weights however its attention computes."""
        from fusedmm.train.model import Forecaster

        torch.manual_seed(SEED)
        variant = next(variant for variant in self.recipe.variant if variant.fusion == "gated")
        model = Forecaster(self.task.sizes_of(variant), self.recipe.model, variant.fusion)
        weight, bias = self.task.skip(self.recipe.model.skip)
        model.set_skip(weight, bias, self.task.target_scale)
        for module in model.modules():
            if isinstance(module, GatedMultimodalAttention):
                module.impl = impl
        return model.to(self.batch.targets.device, self.dtype)


@cache
def task_of(kind: str) -> tuple[Any, Any]:
    """The recipe and its simulated data, small."""
    from fusedmm.train.config import load_recipe
    from fusedmm.train.task import load_task

    sizes = ["data.simulate_days=120", "data.simulate_entities=8"]
    recipe = load_recipe(RECIPE, [*sizes, *MODEL[kind]])
    return recipe, load_task(recipe)


def draw(kind: str, rows: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """The first rows of the train split, again and again."""
    from fusedmm.train.batches import collate

    recipe, task = task_of(kind)
    batch = collate([task.train[row % len(task.train)] for row in range(rows)]).to(device)
    return Problem(task, recipe, cast(batch, dtype), dtype)


def cast(batch: Any, dtype: torch.dtype) -> Any:
    """The batch with its floating-point tensors in another dtype."""
    return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, batch)


def prepare(problem: Problem, *, impl: str = "auto") -> Prepared:
    """Bind the model to the batch."""
    from fusedmm.train.evaluate import batch_loss, forecast

    model = problem.model(impl)

    def forward() -> dict[str, Tensor]:
        prediction = forecast(model, problem.batch).prediction
        return {"loss": batch_loss(prediction, problem.batch.targets, problem.task).sum()}

    upstream = {"loss": torch.ones((), device=problem.batch.targets.device)}
    return Prepared(forward, {name: p for name, p in model.named_parameters() if p.requires_grad}, upstream)


def reference(problem: Problem, dtype: torch.dtype) -> Prepared:
    """The same model with the definition of the attention."""
    exact = Problem(problem.task, problem.recipe, cast(problem.batch, dtype), dtype)
    return prepare(exact, impl="reference")


def build(name: str, kind: str) -> Case:
    """Make the case; its FLOPs are those of the matrix products, as PyTorch counts them."""
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    cpu = draw(kind, BATCH[kind], torch.float32, torch.device("cpu"))
    bound = prepare(cpu)
    flops = {}
    with FlopCounterMode(display=False) as counter:
        outputs = bound.forward()
        flops["forward"] = float(counter.get_total_flops())
        bound.gradients(outputs)
        flops["both"] = float(counter.get_total_flops())
    size = sum(parameter.numel() for parameter in bound.inputs.values()) * dtype.itemsize
    return Case(
        name=name,
        sizes={"rows": BATCH[kind], "parameters": size // dtype.itemsize, "dtype": str(dtype).removeprefix("torch.")},
        problem=partial(draw, kind, BATCH[kind], dtype),
        small=partial(draw, kind, SMALL_BATCH, dtype),
        reference=reference,
        variants=variants(kind),
        flops=flops,
        bytes={"forward": float(size), "both": 3.0 * size},
        dtype=dtype,
    )


def variants(kind: str) -> tuple[Variant, ...]:
    """The model with this project's attention, with the definition, and on a GPU with PyTorch's operators alone."""
    found = [
        Variant("fusedmm", prepare, ours=True),
        Variant("reference-attention", partial(prepare, impl="reference")),
    ]
    if kind == "cuda":
        found.append(Variant("eager-attention", partial(prepare, impl="eager")))
    return tuple(found)


def builders(kind: str) -> dict[str, Callable[[], Case]]:
    """The trainer's case."""
    return {"trainer/step": partial(build, "trainer/step", kind)}
