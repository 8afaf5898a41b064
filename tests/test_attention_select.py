"""Which attention kernels run: a pure function of what is asked for and one table."""

import pytest
import torch

pytest.importorskip("triton")

from fusedmm.kernels.attention import select
from fusedmm.kernels.attention.hopper.config import hopper_reasons
from fusedmm.kernels.attention.select import choose_path

CASE = {
    "direction": "forward",
    "arch": "sm_90",
    "head_dim": 128,
    "dtype": torch.bfloat16,
    "softmax": "joint",
    "features": {"gate", "log_prior"},
    "triton_version": "3.6.0",
}


def test_the_table_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "MEASURED", {})
    assert choose_path(**CASE) == "portable"
    monkeypatch.setattr(select, "MEASURED", {("forward", "joint"): frozenset({128})})
    assert choose_path(**CASE) == "hopper"
    assert choose_path(**CASE, path="portable") == "portable"
    for change in ({"head_dim": 64}, {"direction": "backward"}, {"softmax": "partials"}, {"arch": "sm_80"}):
        assert choose_path(**{**CASE, **change}) == "portable", change
    few = {**CASE, "features": {"gate", "split"}}
    assert choose_path(**few) == "portable"
    assert choose_path(**few, path="hopper") == "hopper"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"arch": "sm_100"}, "architecture sm_100 (sm_90 only)"),
        ({"dtype": torch.float32}, "dtype float32 (float16 and bfloat16 only)"),
        ({"head_dim": 512}, "head dim 512 (a multiple of 8, at most 256)"),
        ({"head_dim": 100}, "head dim 100 (a multiple of 8, at most 256)"),
        ({"direction": "backward", "head_dim": 256}, "head dim 256 (a multiple of 8, at most 128)"),
        ({"features": {"dropout"}}, "dropout"),
        ({"features": {"empty"}}, "a batch without queries or without keys"),
        ({"features": {"output_gate"}, "head_dim": 256}, "output gate at head dim 256 (at most 128)"),
        ({"triton_version": "3.5.1"}, "Triton 3.5.1"),
    ],
)
def test_what_hopper_cannot_do_is_refused_with_the_reason(change: dict[str, object], reason: str) -> None:
    with pytest.raises(NotImplementedError) as error:
        choose_path(**{**CASE, **change}, path="hopper")
    assert reason in str(error.value)
    assert choose_path(**{**CASE, **change}) == "portable"


def test_all_reasons_are_listed() -> None:
    reasons = hopper_reasons("forward", "gfx942", 512, torch.float32, "joint", {"dropout"}, "3.6.0")
    assert len(reasons) == 4
    assert hopper_reasons("forward", "sm_90", 128, torch.float16, "joint", {"visible", "active"}, "3.10.0") == []
