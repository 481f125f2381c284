"""What `benchmarks.healing` measures on and saves, and the plot of it."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.healing import Held, save, shares
from benchmarks.plot_healing import labels, main

LENGTH = 2048


def row_of(variant: str = "plan", tokens: int = 8_000_000, lr: float = 1e-4, **more: Any) -> dict[str, Any]:
    return {
        "variant": variant,
        "tokens": tokens - 4608,
        "recipe": {"distill": {"tokens": tokens, "lr": lr, "batch_tokens": 32768}},
    } | more


@pytest.fixture
def held(tiny_base: Callable[..., Path], word_list: list[str], tmp_path: Path) -> Callable[[int], Held]:
    """`held(prompts)`: over 2 rows for perplexity and 3 more of technical text, 6 more of books."""
    rng, rows = random.Random(0), []
    for kind, count in (("book", 2), ("technical", 5), ("book", 6)):
        for number in range(count):
            text = " ".join(rng.choices(word_list, k=LENGTH))[: LENGTH - 1]
            rows.append({"source": f"{kind}/{number}", "text": text})
    path = tmp_path / "heldout.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(prompts: int) -> Held:
        return Held(
            SimpleNamespace(
                model=str(tiny_base("llama")),
                heldout=str(path),
                eval_tokens=2 * LENGTH,
                length=LENGTH,
                prompts=prompts,
            )
        )

    return make


@pytest.mark.parametrize(
    ("available", "wanted", "taken"),
    [
        ({"a": 9, "b": 9}, 8, {"a": 4, "b": 4}),
        ({"a": 9, "b": 2, "c": 9}, 12, {"a": 5, "b": 2, "c": 5}),
        ({"a": 1, "b": 2}, 9, {"a": 1, "b": 2}),
        ({"a": 0, "b": 5}, 3, {"a": 0, "b": 3}),
        ({"a": 5, "b": 5}, 0, {"a": 0, "b": 0}),
    ],
)
def test_kinds_give_evenly_as_far_as_each_goes(
    available: dict[str, int], wanted: int, taken: dict[str, int]
) -> None:
    assert shares(available, wanted) == taken


def test_prompts_come_from_every_kind_and_never_from_the_rows_for_perplexity(
    held: Callable[[int], Held], capsys: pytest.CaptureFixture[str]
) -> None:
    made, again = held(8), held(8)
    assert made.prompt_text == {"technical": 3, "book": 5}
    assert made.prompts is not None and again.prompts is not None
    assert torch.equal(made.prompts.tokens, again.prompts.tokens)
    assert {kind: len(rows) for kind, rows in made.rows.items()} == {"technical": 2, "book": 2}
    starts = {tuple(row[:64].tolist()) for rows in (*made.rows.values(), made.prompts.tokens) for row in rows}
    assert len(starts) == 2 + 2 + 8
    assert "warning" not in capsys.readouterr().err


def test_text_that_runs_out_is_told(held: Callable[[int], Held], capsys: pytest.CaptureFixture[str]) -> None:
    made = held(20)
    assert made.prompts is not None and len(made.prompts.tokens) == 9
    assert "9 of 20 prompts" in capsys.readouterr().err


def test_runs_at_the_same_time_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "results" / "rows.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: save(path, row_of(f"v{n % 8}", n=n), keep_rows=True), range(16)))
        list(pool.map(lambda n: save(path, row_of(lr=n), keep_rows=True), (1, 2, 3)))
    rows = json.loads(path.read_text())
    assert sorted(row["variant"] for row in rows) == ["plan"] * 3 + [f"v{n}" for n in range(8)]
    save(path, row_of("v3", n="last"), keep_rows=True)
    assert [row["n"] for row in json.loads(path.read_text()) if row["variant"] == "v3"] == ["last"]
    save(path, row_of("v3"), keep_rows=False)
    assert json.loads(path.read_text()) == [row_of("v3")]
    assert [file.name for file in path.parent.iterdir()] == ["rows.json"]


def test_rows_are_called_by_what_tells_them_apart() -> None:
    rows = [row_of(), row_of(tokens=64_000_000), row_of(tokens=64_000_000, lr=2e-4), row_of("uniform")]
    assert labels(rows) == [
        "plan, 8M tokens", "plan, 64M tokens, rate 0.0001", "plan, 64M tokens, rate 0.0002", "uniform",
    ]  # fmt: skip


def test_the_plot_of_several_files_is_the_same_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quality(scale: float) -> dict[str, Any]:
        return {"perplexity": {"book": 30 * scale}, "copy": {"nll": scale, "nll_rise": [scale - 1, 0.01]}}

    files = [tmp_path / name for name in ("a.json", "b.json")]
    for file, tokens in zip(files, (8_000_000, 64_000_000), strict=True):
        points = [{"tokens": 0, "kl": 0.4}, {"tokens": tokens, "kl": 0.06}]
        more = {"converted": quality(1.5), "healed": quality(1.02), "base_perplexity": quality(1)}
        rows = [row_of(tokens=tokens, heldout=points, **more), row_of("base", base_perplexity=quality(1))]
        file.write_text(json.dumps(rows))
    plots = [tmp_path / "1.svg", tmp_path / "2.svg"]
    for plot in plots:
        monkeypatch.setattr(sys, "argv", ["plot_healing", *map(str, files), str(plot)])
        main()
    first, second = (plot.read_bytes() for plot in plots)
    assert first == second and b"<dc:date>" not in first
    for words in (b"plan, 8M tokens", b"plan, 64M tokens", b"perplexity, book (base 30)", b"copy (base 1)"):
        assert words in first
