"""The Python of the documents runs as it stands."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fusedmm.train.__main__ import main
from fusedmm.train.config import load_recipe
from fusedmm.train.task import load_task

ROOT = Path(__file__).resolve().parent.parent


def blocks(page: str) -> list[str]:
    """The Python blocks of a page, in order."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def run(page: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run every block of a page, one after another, with ``names`` defined beforehand."""
    found = blocks(page)
    assert found
    for place, block in enumerate(found):
        exec(compile(block, f"{page}, block {place}", "exec"), names)
    return names


def test_readme() -> None:
    shapes = {"price": (20, 16), "text": (9, 384), "audio": (12, 29)}
    names = {name: torch.randn(4, *shape) for name, shape in shapes.items()}
    names |= {f"{name}_mask": torch.rand(4, shape[0]) > 0.3 for name, shape in shapes.items()}
    names |= {f"{name}_time": torch.randint(0, 100, (4, shape[0])) for name, shape in shapes.items()}
    names |= {"query": torch.randn(4, 6, 256), "now": torch.full((4, 6), 50)}
    projections = {f"to_{name}": nn.Linear(shape[1], 256) for name, shape in shapes.items()}
    before, after = blocks("README.md")
    exec(before, {"torch": torch, "nn": nn, **names, **projections})
    found: dict[str, Any] = names
    exec(after, found)
    assert found["out"].shape == (4, 6, 256)
    assert found["mass"].shape == (4, 6, 8, 3)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch, "compile", partial(torch.compile, backend="aot_eager")
    )  # traced whole, without a compiler
    (tmp_path / "recipe.toml").write_text("[train]\nsteps = 0\n[data]\nsimulate_days = 80\n[run]\ntensorboard = false")
    assert main([str(tmp_path / "recipe.toml"), f"run.out={tmp_path}", "run.bootstrap=100"]) in (0, 2)
    names = {"path": tmp_path / "model.pt", "run": tmp_path / "runs" / "gated-seed0"}
    found = run("docs/guide.md", names)
    assert found["scores"].shape == (16, 8, 3)
    assert found["squared"].shape == (16, 8, 3)
    assert found["gate"].active(1).all()
    torch.testing.assert_close(found["same"], found["result"].output)
    assert found["logits"].dtype == torch.bfloat16
    assert "skip_weight" in found["stored"].weights


def test_data_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = run("docs/data-format.md", {})
    batch = found["batch"]
    assert {name: x.shape[1:] for name, x in batch.tokens.items()} == {
        "price": (8, 3),
        "text": (1, 32),
        "audio": (5, 4),
    }
    (recipe,) = re.findall(r"^```toml\n(.*?)^```", (ROOT / "docs/data-format.md").read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "mine.toml").write_text(recipe)
    task = load_task(load_recipe("mine.toml"))
    assert len(task.train) > len(task.split("test")) > 0


def test_distillation() -> None:
    names = {
        "hidden": torch.randn(10, 16, requires_grad=True),
        "head": nn.Linear(16, 40),
        "teacher_hidden": torch.randn(10, 24),
        "teacher_head": nn.Linear(24, 40),
        "labels": torch.randint(0, 40, (10,)),
    }
    found = run("docs/distillation.md", names)
    assert found["keep"].sum() == 6
    found["loss"].backward()
    assert found["head"].weight.grad.isfinite().all()
