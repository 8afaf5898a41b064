"""The public names: what the contract promises is there, documented, and importing it costs nothing."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import fusedmm

ROOT = Path(__file__).resolve().parent.parent

# Parameters in order; "*" ends the positional ones.
SIGNATURES = {
    "gated_multimodal_attention": (
        "query key value layout * log_prior gate output_gate active query_time key_time lookback "
        "softmax scale dropout_p impl need_mass"
    ),
    "distillation_scores": "student teacher labels * temperature beta ignore_index impl",
    "distillation_loss": (
        "student teacher labels * beta temperature alpha label_smoothing row_weight ignore_index "
        "reduction normalizer memory impl"
    ),
}
FIELDS = {
    "AttentionOutput": "output mass lse",
    "ModalityPartials": "output lse",
    "DistillationScores": (
        "forward_kl reverse_kl hellinger student_entropy teacher_entropy student_confidence teacher_confidence "
        "agreement student_nll teacher_nll excess_loss el2n margin grad_norm divergence"
    ),
}
PROMISED = {
    *SIGNATURES,
    *FIELDS,
    "ModalityLayout",
    "modality_partials",
    "merge_modalities",
    "leave_one_out",
    "LinearHead",
    "Logits",
    "TopKLogProbs",
    "select_rows",
    "modality_scores",
    "ShapeError",
    "nn",
}


def parameters(function: Callable[..., object]) -> str:
    words = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        words.append(parameter.name)
    return " ".join(words)


def test_the_promised_names_are_public() -> None:
    assert set(fusedmm.__all__) >= PROMISED
    assert sorted(set(fusedmm.__all__)) == sorted(fusedmm.__all__), "a name is listed twice"
    for name in fusedmm.__all__:
        getattr(fusedmm, name)


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_signature_is_the_contract_s(name: str) -> None:
    found, promised = parameters(getattr(fusedmm, name)).split(), SIGNATURES[name].split()
    extra = [word for word in found if word not in promised]
    assert [word for word in found if word in promised] == promised
    assert all(word in found[found.index("*") :] for word in extra), f"{extra} must be keyword-only"


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_results_are_named_tuples_with_the_promised_fields(name: str) -> None:
    fields = getattr(fusedmm, name)._fields
    assert set(fields) >= set(FIELDS[name].split())


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_operators_are_documented_in_full(name: str) -> None:
    text = inspect.getdoc(getattr(fusedmm, name)) or ""
    for section in ("Args:", "Returns:", "Raises:", "Cost:"):
        assert section in text, f"{name}: no section {section}"
    for parameter in SIGNATURES[name].replace("* ", "").split():
        assert f"{parameter}" in text, f"{name}: {parameter} is not described"


def test_every_public_name_has_a_docstring() -> None:
    for name in fusedmm.__all__:
        value = getattr(fusedmm, name)
        if callable(value):
            own = inspect.getdoc(value) or ""
            assert own, f"{name} has no docstring"
            assert not own.startswith(f"{name}("), f"{name} has no docstring of its own"


def test_importing_is_free() -> None:
    """No Triton, no GPU context, no change of PyTorch's global state, no warning."""
    code = (
        "import torch\n"
        "state = lambda: (torch.get_default_dtype(), torch.backends.cuda.matmul.allow_tf32, torch.get_num_threads(),\n"
        "    torch.are_deterministic_algorithms_enabled(), torch.initial_seed(), torch.is_grad_enabled())\n"
        "before = state()\n"
        "import sys\n"
        "import fusedmm, fusedmm.nn, fusedmm.testing\n"
        "assert 'triton' not in sys.modules, 'triton is imported'\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert state() == before\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
