"""The command line of the benchmarks: what it lists, in which order, and what it refuses in one line."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import results
from benchmarks.cases import builders
from benchmarks.command import COMMANDS, main
from tests.benchmark_rows import RESULT


def test_help_names_every_command_and_a_missing_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)
    with pytest.raises(SystemExit, match="2"):
        main(["compare", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    assert "no such file" in capsys.readouterr().err
    (tmp_path / "a.jsonl").write_text("not of a run\n")
    with pytest.raises(SystemExit, match="2"):
        main(["keep", str(tmp_path / "a.jsonl")])
    assert "a.jsonl:1 must be a run or a result, got 'not of a run'" in capsys.readouterr().err
    assert main(["paths", str(tmp_path / "a.jsonl")]) == 2
    assert "a.jsonl:1 must be a run or a result, got 'not of a run'" in capsys.readouterr().out


def test_an_unknown_variant_is_refused_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.roofline.measure", None)
    with pytest.raises(SystemExit, match="2"):
        main(["attention/tiny", "--device", "cpu", "--variants", "foo"])
    assert "--variants: no case has foo; there are compile, eager, fusedmm" in capsys.readouterr().err
    with pytest.raises(TypeError):  # beside a known one it is left out
        main(["attention/tiny", "--device", "cpu", "--variants", "fusedmm", "foo"])
    assert capsys.readouterr().err == "benchmarks: no case has foo\n"


def test_warming_up_says_what_is_ready(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["warm", "attention/tiny", "--device", "cpu", "--jobs", "1"]
    assert main([*words, "--without", "compile", "reference-attention", "sdpa", "eager"]) == 0
    assert capsys.readouterr().out == "attention/tiny: ready\n"


def test_a_gpu_case_says_why_it_is_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["--device", "cuda"]) == 2
    assert "no CUDA device here. On one, run ci/gpu." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--threads", "0"], "--threads: must be at least 1, got 0"),
        (["--seconds", "-1"], "--seconds: must be positive and finite, got -1"),
        (["--seconds", "nan"], "--seconds: must be positive and finite, got nan"),
        (["--json", "."], "--json: is a folder, not a file: ."),
        (["warm", "--jobs", "0"], "--jobs: must be at least 1, got 0"),
        (["static", "--json", "."], "--json: is a folder, not a file: ."),
        (["keep", "."], "is a folder: ."),
    ],
)
def test_what_no_option_takes_is_one_line(words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert capsys.readouterr().err.strip().splitlines()[-1].endswith(complaint)


def test_an_unknown_kernel_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(SystemExit, match="static: --only must be part of a kernel's name, got 'nope'"):
        main(["static", "--only", "nope"])


def test_an_unknown_case_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["no-such-case", "--device", "cpu"]) == 2
    assert "no case for cpu contains no-such-case" in capsys.readouterr().err


def test_an_unknown_commit_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["attention/tiny", "--against", "no-such-commit"])
    assert "--against: no such commit here: no-such-commit" in capsys.readouterr().err


def test_the_list_says_its_order_beside_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    assert sorted(shown.out.split()) == sorted(builders("cpu"))
    assert "in the order in which they run" in shown.err


def test_a_second_quick_run_begins_where_the_first_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.jsonl"
    words = ["tiny", "dense-gated-d128-4k", "dense-plain-d128-4k", "--quick", "--device", "cuda", "--list"]
    main([*words, "--json", str(file)])
    first, second, *_ = capsys.readouterr().out.split()
    results.append(file, [replace(RESULT, case=first)])
    main([*words, "--json", str(file)])
    assert (shown := capsys.readouterr().out.split())[0] == second
    assert shown[-1] == first
