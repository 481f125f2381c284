"""`hyconvert bench` measures tiny models on the CPU, dense beside converted, and refuses what it cannot time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hyconvert.bench import Grid, bench, find_subjects
from hyconvert.bench.measure import Bench, Row, correlated
from hyconvert.bench.report import BenchReport
from hyconvert.bench.roofline import Ceilings, Work, prefill_work, step_work
from hyconvert.bench.targets import Subject, shape_config, shapes
from hyconvert.cli import app
from hyconvert.errors import CheckpointError, HyconvertError, PlanError
from hyconvert.generation import Decoder
from hyconvert.generation.network import read_network
from hyconvert.kv import base_kv_bytes, kv_bytes
from hyconvert.modeling import HyConvertConfig
from tests.modeling.tiny import base_config, base_model, mixed_model, plan_of

SMALL = ("--batch", "1,2", "--context", "48", "--steps", "2", "--repeats", "1", "--device", "cpu")
PLAN = ("--block-size", "16", "--topk", "1", "--window", "16")


def run(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def test_a_base_is_timed_dense_and_under_several_plans(
    tiny_base: Callable[..., Path], tmp_path: Path
) -> None:
    base, out, plot = tiny_base("qwen3"), tmp_path / "rows.json", tmp_path / "times.svg"
    code, stdout, stderr = run(
        "bench", base, "--base", "--uniform", "1:1", "--plan", "F S0 W F", *SMALL, *PLAN, "-o", out, "--plot", plot,
        "--json",
    )  # fmt: skip
    assert code == 0, stderr
    report = json.loads(stdout)
    assert json.loads(out.read_text()) == report
    assert plot.read_text().count("<svg") == 1
    rows = report["rows"]
    assert [row["model"] for row in rows[:: len(rows) // 3]] == ["dense", "1:1", "F S0 W F"]
    assert report["plans"] == {"1:1": "F S0 F*2", "F S0 W F": "F S0 W F"}
    assert sorted({(r["what"], r["batch"]) for r in rows}) == [
        ("decode", 1), ("decode", 2), ("prefill", 1), ("prefill", 2), ("throughput", 2),
    ]  # fmt: skip
    for row in rows:
        assert row["seconds"] > 0 and row["error"] is None, row
        assert (row["gain"] is None) == (row["model"] == "dense")
    decode = {row["model"]: row["kv_bytes"] for row in rows if row["what"] == "decode" and row["batch"] == 2}
    assert (
        decode["dense"] == 2 * 4 * 51 * 2 * 2 * 16 * 4
    )  # rows, layers, tokens, K and V, KV heads, d, float32
    assert decode["F S0 W F"] == decode["dense"] // 2 + 2 * 2 * 16 * 2 * 2 * 16 * 4


def test_long_caches_may_be_timed_in_fp8(tiny_base: Callable[..., Path]) -> None:
    settings = ("--base", "--plan", "F S0 W F", "--what", "decode,prefill", *SMALL, *PLAN, "--kv-dtype")
    code, stdout, stderr = run("bench", tiny_base("qwen3"), *settings, "fp8", "--json")
    assert code == 0, stderr
    report = json.loads(stdout)
    assert report["dtype"] == "float32, long caches in fp8" and not [r for r in report["rows"] if r["error"]]
    held = {
        row["model"]: row["kv_bytes"]
        for row in report["rows"]
        if (row["what"], row["batch"]) == ("decode", 1)
    }
    assert held["dense"] == 4 * 51 * 2 * 2 * (16 + 4)  # layers, tokens, K and V, KV heads, d and a scale
    assert held["F S0 W F"] == held["dense"] // 2 + 2 * 16 * 2 * 2 * 16 * 4
    code, _, stderr = run("bench", tiny_base("qwen3"), *settings, "int8")
    assert code == 2 and "kv_dtype 'int8' is not known; use fp8" in stderr and len(stderr.splitlines()) == 1


def test_a_converted_model_is_timed_with_its_weights(tiny_base: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "converted"
    code, _, stderr = run("convert", tiny_base("llama"), "-o", out, "--plan", "F S0 W F", "--no-align", *PLAN)
    assert code == 0, stderr
    rows = tmp_path / "rows.json"
    code, stdout, stderr = run("bench", out, "--base", "--what", "prefill,decode", *SMALL, "-o", rows)
    assert code == 0, stderr
    found = [(row["model"], row["what"], row["note"]) for row in json.loads(rows.read_text())["rows"]]
    assert found[0] == ("dense", "prefill", None) and found[4] == ("converted", "prefill", "built-in text")
    assert "converted" in stdout and "dense" in stdout and "x dense" in stdout
    assert "bench 8/8" in stderr
    code, _, stderr = run("bench", out, "--uniform", "1:1")
    assert code == 2 and "is converted and has its plan" in stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no-such-model",), "neither a folder nor a shape; the shapes are Qwen3-8B, Llama-3.1-8B"),
        (("Qwen3-8B", "--uniform", "3"), "is not a ratio"),
        (("Qwen3-8B", "--plan", "F S0"), "the plan has 2 layers, but the model has 36"),
        (("Qwen3-8B", "--what", "speed"), "'speed' is nothing to measure"),
        (("Qwen3-8B", "--overlap", "most"), "use own or text"),
        (("Qwen3-8B", "--context", "256k", "--device", "cpu"), "more than Qwen3-8B's 131072 positions"),
        (("Qwen3-8B", "--batch", "many"), "--batch many is no number"),
        (("Qwen3-8B", "--dtype", "int8", "--device", "cpu"), "dtype 'int8' is not known"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    code, _, stderr = run("bench", *arguments)
    assert code == 2
    assert message in stderr and len(stderr.splitlines()) == 1


def test_a_base_needs_a_plan(tiny_base: Callable[..., Path]) -> None:
    with pytest.raises(PlanError, match="say with --uniform 1:N or --plan"):
        find_subjects(str(tiny_base("llama")))


@pytest.mark.parametrize("name", list(shapes()))
def test_named_shapes_convert_by_their_ratio(name: str) -> None:
    dense, converted = find_subjects(name.lower(), base=True)
    assert dense.plan is None and converted.plan is not None
    assert converted.name == f"1:{shapes()[name]['uniform']}"
    with torch.device("meta"):
        from hyconvert.bench.targets import model_class

        model = model_class(dense.config)(dense.config)
    billions = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    want = {
        "Qwen3-8B": 8.19,
        "Llama-3.1-8B": 8.03,
        "Qwen3-30B-A3B": 30.5,
        "HySparse-7B": 7.6,
        "HySparse-80B-A3B": 80,
        "SmolLM2-135M": 0.1345,
    }
    assert billions == pytest.approx(want[name], rel=0.02)


def test_the_paper_s_80b_shape_keeps_five_full_layers() -> None:
    (converted,) = find_subjects("HySparse-80B-A3B")
    assert converted.plan is not None and converted.plan.full_layers == (0, 12, 24, 36, 48)


def test_random_weights_are_made_in_their_dtype() -> None:
    config = base_config("qwen3")
    subject = Subject("x", HyConvertConfig.from_base(config, plan_of("F S0 R0 W F S4 F")))
    model = subject.build(torch.device("cpu"), torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert float(model.model.layers[1].mlp.up_proj.weight.float().std()) > 0.01


def test_work_of_a_step_counts_what_must_be_read() -> None:
    network = read_network(base_model("llama"))
    model = network.config
    weights = sum(p.numel() for p in base_model("llama").parameters()) - model.vocab_size * model.hidden_size
    norms = (2 * 7 + 1) * model.hidden_size
    work = step_work(network, 3, 100)
    keys = sum(base_kv_bytes(model, 101, dtype_bytes=4, batch=3))
    assert work.bytes == 4 * (weights - norms) + keys
    assert work.operations == 2 * 3 * (weights - norms) + 3 * 4 * 7 * 101 * 4 * 8
    converted = read_network(mixed_model(line="F S0 W F*4"))
    keys = sum(kv_bytes(converted.config, 101, dtype_bytes=4, static=True)) + (2 * 4) * 2 * 2 * 8 * 4
    read = step_work(converted, 1, 100).bytes - 4 * (weights - norms)
    assert read == keys + 4 * (4 * 32 + 2 * 4 * 8 * 8)  # and the gate and the maps of one layer


def test_work_of_a_prompt_counts_causal_attention_once() -> None:
    network = read_network(base_model("llama"))
    longer, shorter = (prefill_work(network, 1, length).operations for length in (4096, 2048))
    linear = (shorter - attention_operations(2048)) / 2048
    assert longer == pytest.approx(linear * 4096 + attention_operations(4096), rel=1e-4)


def attention_operations(length: int) -> float:
    return 4 * 4 * 8 * (6 * length**2 / 2 + length)  # six layers whole; of the last one a single query


def test_experts_are_read_once_however_many_tokens_want_them() -> None:
    network = read_network(base_model("qwen3_moe"))
    bytes_of = [step_work(network, batch, 1).bytes for batch in (1, 4, 4000)]
    every = sum(float(w.nbytes) for block in network.blocks for w in block.mlp.weights())
    assert bytes_of[0] < bytes_of[1] and bytes_of[0] < every + 1e6
    moved = step_work(network, 4000, 1)
    assert moved.bytes > every


def test_floor_is_the_slower_of_bytes_and_operations() -> None:
    ceilings = Ceilings(1e12, 1e14)
    assert ceilings.floor(Work(2e12, 1e14)) == 2.0
    assert ceilings.floor(Work(1e12, 5e14)) == 5.0
    row = Row("x", "decode", 1, 1, seconds=4.0, floor_seconds=1.0)
    assert row.roofline == 0.25 and Row("x", "decode", 1, 1).roofline is None


def test_memory_that_runs_out_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Bench("x", read_network(mixed_model()), steps=1, repeats=1)

    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB")

    monkeypatch.setattr("hyconvert.bench.measure.Decoder", full)
    for row in (
        measured.decode(1, 20),
        measured.prefill(torch.ones(1, 20).long()),
        measured.throughput(20, most=3),
    ):
        assert row.seconds is None and row.error is not None and row.error.startswith("out of memory")
    assert row.batch == 1, "smaller batches are tried"


def test_the_largest_batch_that_fits_is_found_by_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Bench("x", read_network(mixed_model()), steps=1, repeats=1)

    def limited(network: Any, *, batch: int, **options: Any) -> Decoder:
        if batch > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB")
        return Decoder(network, batch=batch, **options)

    monkeypatch.setattr("hyconvert.bench.measure.Decoder", limited)
    row = measured.throughput(20, most=9)
    assert row.batch == 5 and row.error is None


def test_gains_compare_throughput_at_any_batch_and_steps_at_the_same() -> None:
    rows = [
        Row("dense", "decode", 1, 8, 1.0, 1.0), Row("dense", "throughput", 12, 8, 1.0, 12.0),
        Row("1:3", "decode", 1, 8, 0.5, 2.0), Row("1:3", "decode", 2, 8, 0.5, 4.0),
        Row("1:3", "throughput", 40, 8, 1.0, 36.0),
    ]  # fmt: skip
    report = BenchReport("x", "cpu", "float32", {}, {}, rows=rows)
    assert [report.gain(row) for row in rows] == [None, None, 2.0, None, 3.0]


def test_synthetic_selections_are_eligible_and_overlap() -> None:
    network = read_network(mixed_model())
    length = 300
    select = correlated(network, 2, length, keep=0.97)
    drawn = select(torch.zeros(2, 2, length, 2, dtype=torch.int32), 0)
    assert torch.equal(select(torch.zeros(2, 2, 40, 2, dtype=torch.int32), 200), drawn[:, :, 200:240])
    assert drawn.shape == (2, 2, length, 2) and drawn.dtype == torch.int32
    slots = torch.arange(length)[:, None]
    assert ((drawn == -1) | (drawn * network.block_size <= slots - 6)).all()
    assert (drawn[:, :, :6] == -1).all() and (drawn[:, :, 250:] >= 0).all()
    same = (drawn[0, 0, 251:] == drawn[0, 0, 250:-1]).float().mean()
    assert 0.85 < float(same) < 1


def test_prompts_may_be_timed_with_overlapping_selections() -> None:
    subjects = [Subject("x", HyConvertConfig.from_base(base_config("qwen3"), plan_of("F S0 R0 W F S4 F")))]
    grid = Grid((1,), (60,), ("prefill",), repeats=1, overlap="text")
    report = bench("tiny", subjects, grid, device="cpu")
    assert report.rows[0].note == "synthetic selections that overlap as in text"
    with pytest.raises(HyconvertError, match="must be at least 1"):
        Grid((0,), (60,))


def test_a_profile_lists_what_a_step_spends_its_time_on() -> None:
    rows = Bench("x", read_network(mixed_model()), steps=8).profile(1, 20, top=5)
    assert len(rows) == 5 and rows[0]["us"] >= rows[-1]["us"] > 0


def test_weights_that_do_not_fit_are_the_user_s_to_know(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        @staticmethod
        def _from_config(*args: Any, **kwargs: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("hyconvert.bench.targets.model_class", lambda config: Full)
    with pytest.raises(CheckpointError, match="the weights of x do not fit on cpu"):
        Subject("x", shape_config("Qwen3-8B")).build(torch.device("cpu"), torch.bfloat16)
