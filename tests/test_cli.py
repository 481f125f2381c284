"""The command line: what a newcomer types, rightly and wrongly."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hyconvert.cli import app
from hyconvert.data import read_texts
from hyconvert.plan import Plan


def run(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words") / "words.jsonl"
    rows = [{"text": " ".join(f"word {i * j % 97}" for j in range(60))} for i in range(1, 12)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


SMALL = [
    "--sequence-length", "256", "--fit-tokens", "512", "--prompts", "1", "--questions", "0", "--decoys", "0",
    "--copies", "1", "--block-size", "16", "--topk", "2", "--window", "16", "--device", "cpu",
]  # fmt: skip
"""Options of `measure` for a tiny base."""


def test_help_answers_at_once() -> None:
    began = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-m", "hyconvert", "--help"], capture_output=True, text=True, check=True
    )
    assert (
        time.monotonic() - began < 2
    )  # 0.1 s here; torch alone would take longer than this on a slow machine
    assert "convert" in result.stdout
    script = "import sys; sys.argv = ['hyconvert']; import hyconvert.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_convert_inspect_eval(tiny_base: Callable[..., Path], tmp_path: Path, words: Path) -> None:
    base, out = tiny_base("llama"), tmp_path / "out"
    options = (
        "--full-layers",
        "0,2-3",
        "--block-size",
        "16",
        "--topk",
        "2",
        "--window",
        "16",
        "--sequence-length",
        "64",
    )
    options += ("--calibration", str(words), "--calibration-tokens", "512", "--device", "cpu")
    code, stdout, stderr = run("convert", base, "-o", out, *options)
    assert code == 0, stderr
    assert "F S0 F*2" in stdout and "perplexity on held-out calibration text" in stdout
    assert "Aligning 4/4" in stderr
    code, stdout, _ = run("inspect", out)
    assert code == 0 and "F S0 F*2" in stdout and "8k tokens" in stdout
    code, stdout, _ = run("inspect", out, "--json")
    data = json.loads(stdout)
    assert data["line"] == "F S0 F*2" and data["layers"][1]["source"] == 0
    assert data["layers"][0]["kv_bytes_per_token"] == 2 * 2 * 16 * 2
    code, stdout, _ = run(
        "eval",
        out,
        "--data",
        words,
        "--tokens",
        "256",
        "--sequence-length",
        "64",
        "--device",
        "cpu",
        "--json",
    )
    result = json.loads(stdout)
    assert code == 0 and result["tokens"] == 256
    assert result["ratio"] == pytest.approx(result["converted_perplexity"] / result["base_perplexity"])


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--full-layers", "0,3", "--topk", "129"], "top-k 129; it must be from 1 to 128"),
        (["--full-layers", "0,3", "--block-size", "8"], "block size 8; it must be 16, 32, 64 or 128"),
        (["--plan", "F W F W", "--topk", "129"], None),  # nothing selects
    ],
)
def test_a_plan_that_no_kernel_runs_is_converted_with_a_warning(
    tiny_base: Callable[..., Path], tmp_path: Path, options: list[str], said: str | None, dry: bool
) -> None:
    more = ["--no-align", *(["--dry-run"] if dry else [])]
    code, _, stderr = run("convert", tiny_base("llama"), "-o", tmp_path / "out", *options, *more)
    assert code == 0
    assert ("warning:" in stderr) is (said is not None)
    assert said is None or f"warning: the GPU kernels refuse this model: {said}" in stderr
    assert (tmp_path / "out").exists() is not dry


def test_measure_plan_and_convert(tiny_base: Callable[..., Path], tmp_path: Path, words: Path) -> None:
    base, costs = tiny_base("llama"), tmp_path / "costs"
    code, stdout, stderr = run("measure", base, "-o", costs, "--calibration", words, *SMALL)
    assert code == 0, stderr
    assert "10 candidates" in stdout and "Measuring windows 4/4" in stderr
    code, stdout, _ = run(
        "plan", costs, "--full-layers", "2", "--pin", "0=full", "-o", tmp_path / "plan.json", "--json"
    )
    chosen = json.loads(stdout)
    assert (
        code == 0 and 0 in chosen["full_layers"] and Plan.load(tmp_path / "plan.json").line == chosen["line"]
    )
    code, stdout, _ = run(
        "plan", costs, "--kv-budget", "60%", "--context", "4k", "--refine", "2", "--device", "cpu"
    )
    assert code == 0 and "if window" in stdout and "measured as a whole" in stdout
    copying = ["plan", costs, "--full-layers", "2", "--pin", "0=full", "--tasks", "copy", "--json"]
    code, stdout, _ = run(*copying)
    assert code == 0 and json.loads(stdout) == chosen and chosen["tasks"] == ["copy"]  # all that was measured
    code, stdout, _ = run("plan", costs, "--sweep", "--context", "4k")
    assert code == 0 and "knee" in stdout
    assert len(json.loads((costs / "frontier.json").read_text())["plans"]) == 4
    kept = [(path, path.read_bytes()) for path in (tmp_path / "plan.json", costs / "frontier.json")]
    for asked in (["--sweep"], ["--full-layers", "3", "--refine", "2", "-o", tmp_path / "plan.json"]):
        code, _, stderr = run("plan", costs, *asked, "--tasks", "copy", "--tasks", "needle,multivalue")
        assert code == 2 and stderr.count("\n") == 1
        assert "--tasks multivalue, needle: not measured in these costs, which have copy;" in stderr
    assert all(path.read_bytes() == content for path, content in kept)
    out = tmp_path / "out"
    fit = [
        "--calibration",
        words,
        "--calibration-tokens",
        "256",
        "--sequence-length",
        "64",
        "--device",
        "cpu",
    ]
    code, stdout, stderr = run("convert", base, "-o", out, "--costs", costs, "--kv-budget", "0.6", *fit)
    assert code == 0, stderr
    assert json.loads((out / "conversion.json").read_text())["planning"]["kv_share"] <= 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--full-layers", "2"], "no costs can be read"),
        (["--full-layers", "2", "--pin", "0"], "LAYER=KIND"),
        (["--ratio", "3", "--full-layers", "2"], "no costs can be read"),
        (["--full-layers", "2", "--context", "far"], "--context far"),
    ],
)
def test_mistakes_in_planning_are_one_line(options: list[str], message: str, tmp_path: Path) -> None:
    code, _, stderr = run("plan", tmp_path, *options)
    assert code == 2 and message in stderr and stderr.count("\n") == 1


def test_a_dry_run_writes_nothing(tiny_base: Callable[..., Path], tmp_path: Path) -> None:
    code, stdout, _ = run(
        "convert", tiny_base("llama"), "-o", tmp_path / "out", "--uniform", "1:1", "--dry-run"
    )
    assert code == 0 and "F S0 F*2" in stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--uniform", "3"], "write 1:N"),
        (["--uniform", "1:0"], "write 1:N"),
        (["--full-layers", "0,x"], "'x' in --full-layers"),
        (["--full-layers", "0,17"], "layers 0 to 3"),
        (["--plan", "F S0 Q F"], "'Q' in the layer map"),
        (["--plan", "missing.json"], "no plan at missing.json"),
        (["--uniform", "1:1", "--topk", "0"], "topk"),
        (["--uniform", "1:1", "--gate", "mrge"], "gate"),
        (["--uniform", "1:1", "--calibration", "/no/such/file.txt"], "/no/such/file.txt"),
        (["--uniform", "1:1", "--calibration", "no-such/dataset"], "no-such/dataset"),
        (["--uniform", "1:1", "--device", "cuda:99"], "device 'cuda:99'"),
        (["--uniform", "1:1", "--device", "gpu"], "device 'gpu'"),
        (["--full-layers", "3-0"], "'3-0' in --full-layers"),
        (["--dry-run"], "hyconvert measure and hyconvert plan"),
        (["--uniform", "1:1", "--kv-budget", "25%"], "nothing to choose"),
        (["--kv-budget", "250%"], "no share"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tiny_base: Callable[..., Path], tmp_path: Path, options: list[str], message: str
) -> None:
    code, stdout, stderr = run("convert", tiny_base("llama"), "-o", tmp_path / "out", *options)
    lines = [line for line in stderr.splitlines() if line]
    assert code == 2 and not stdout
    assert len(lines) == 1 and lines[0].startswith("hyconvert: ") and message in lines[0], stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("out", "message"),
    [("file/sub/out", "file, which is no folder; choose another name"), ("x" * 300, "choose a shorter name")],
)
def test_a_folder_that_cannot_be_is_refused(
    tiny_base: Callable[..., Path], tmp_path: Path, out: str, message: str
) -> None:
    (tmp_path / "file").write_text("kept")
    code, _, stderr = run(
        "convert", tiny_base("llama"), "-o", tmp_path / out, "--uniform", "1:1", "--no-align"
    )
    assert code == 2 and message in stderr and stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (
        tmp_path / "file"
    ).read_text() == "kept"


@pytest.mark.parametrize(
    "command",
    [
        ["measure", "BASE", "--calibration", "WORDS", *SMALL],
        ["bench", "SmolLM2-135M", "--uniform", "1:3", "--context", "64", "--batch", "1"],
    ],
    ids=["measure", "bench"],
)
def test_an_output_under_a_file_is_one_line(
    tiny_base: Callable[..., Path], tmp_path: Path, words: Path, command: list[str]
) -> None:
    (tmp_path / "file").write_text("kept")
    given = {"BASE": tiny_base("llama"), "WORDS": words}
    command = [str(given.get(word, word)) for word in command]
    code, _, stderr = run(*command, "-o", tmp_path / "file" / "out")
    assert code == 2 and "file" in stderr and stderr.splitlines()[-1].endswith("; choose another path")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("command", ["inspect", "eval"])
def test_a_folder_without_a_converted_model_is_refused(
    tiny_base: Callable[..., Path], tmp_path: Path, command: str
) -> None:
    for path, message in ((tmp_path, "no config.json"), (tiny_base("llama"), "type 'llama'")):
        code, _, stderr = run(command, path)
        assert code == 2 and message in stderr and stderr.count("\n") == 1


def test_interruption_leaves_nothing_behind(
    tiny_base: Callable[..., Path], tmp_path: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hyconvert.conversion.align", interrupted)
    options = ("--uniform", "1:1", "--calibration", str(words), "--sequence-length", "64")
    code, _, stderr = run("convert", tiny_base("llama"), "-o", tmp_path / "out", *options)
    assert code == 130 and "interrupted" in stderr
    assert not list(tmp_path.iterdir())


def test_text_sources_read_alike(tmp_path: Path) -> None:
    import gzip
    import lzma

    rows = "\n".join(json.dumps({"text": f"document {i}", "id": i}) for i in range(3))
    (tmp_path / "a.jsonl").write_text(rows)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(rows)
    with lzma.open(tmp_path / "c.jsonl.xz", "wt") as file:
        file.write(rows)
    expected = [f"document {i}" for i in range(3)]
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.xz"):
        assert list(read_texts(str(tmp_path / name))) == expected, name
    (tmp_path / "texts").mkdir()
    for i in range(3):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"document {i}")
    assert list(read_texts(str(tmp_path / "texts"))) == expected
    assert sum(map(len, read_texts("pydoc"))) > 300_000
