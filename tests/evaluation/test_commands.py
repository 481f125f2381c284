"""`hyconvert eval` and `hyconvert chat` as they are typed."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hyconvert.cli import app
from hyconvert.errors import DataError, HyconvertError
from hyconvert.evaluation.chat import Speaker, chat
from hyconvert.evaluation.models import Pair
from hyconvert.evaluation.settings import EvalSettings
from hyconvert.evaluation.tasks import metrics_of, run_tasks
from hyconvert.kv import kv_bytes

TINY = [
    "--tokens",
    "128",
    "--sequence-length",
    "64",
    "--new-tokens",
    "4",
    "--device",
    "cpu",
    "--generations",
    "1",
]


def run(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def test_eval_writes_a_report_and_fails_a_model_that_breaks_its_gate(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    limits = tmp_path / "limits.yaml"
    keys = ("copy_nll_rise", "needle_drop", "agreement", "own_text_rise", "repeated_rise", "perplexity_ratio")
    limits.write_text("\n".join(f"{key}: null" for key in keys) + "\nkl: 0.0001\n")
    arguments = ["eval", checkpoint, "--data", text, *TINY, "--parts", "text,speed", "--quick"]
    code, stdout, stderr = run(*arguments, "--limits", limits, "-o", tmp_path / "sub/report.html")
    assert code == 1, stderr
    assert "FAIL: KL from the base per token" in stdout and "Reading text 2/2" in stderr
    data = json.loads((tmp_path / "sub/report.json").read_text())
    assert data["verdict"]["passed"] is False and data["tokens"] == 128
    assert (tmp_path / "sub/report.html").read_text().startswith("<!doctype html>")
    limits.write_text("\n".join(f"{key}: null" for key in keys) + "\nkl: 50\n")
    code, stdout, stderr = run(*arguments, "--limits", limits, "--json")
    assert code == 0 and json.loads(stdout)["verdict"]["passed"] and not stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parts", "text,speeed"], "parts"),
        (["--tokens", "lots"], "--tokens lots"),
        (["--depths", "0.1,2"], "depths must lie between 0 and 1"),
        (["--limits", "missing.yaml"], "missing.yaml cannot be read"),
        (["--data", "/no/such.txt"], "/no/such.txt"),
        (["--base", "/no/base"], "/no/base"),
        (["--tasks", "vt"], "pip install 'hyconvert[tasks]'"),
        (["--lengths", "128", *TINY], "leaves room for"),
    ],
)
def test_mistakes_are_one_line(
    checkpoint: Path, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, stdout, stderr = run("eval", checkpoint, "--device", "cpu", "--json", *options)
    assert code == 2 and not stdout and message in stderr and stderr.count("\n") == 1, stderr


def test_quick_is_overridden_by_what_is_given() -> None:
    assert EvalSettings.create(quick=True, new_tokens=5).new_tokens == 5
    assert EvalSettings.create(quick=True, new_tokens=None).new_tokens == 16
    assert EvalSettings().prompt_lengths() == (1024, 2048)
    with pytest.raises(DataError, match="sequence_length"):
        EvalSettings.create(sequence_length=1)


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in for lm-evaluation-harness; gives what it was called with."""
    calls: list[dict[str, Any]] = []

    def simple_evaluate(**options: Any) -> dict[str, Any]:
        calls.append(options)
        if "unknown" in options["tasks"]:
            raise KeyError("unknown")
        values = {
            "alias": "vt",
            "4096,none": 0.25,
            "8192,none": -1,
            "4096_stderr,none": "N/A",
            "sample_len": 2,
        }
        return {"results": {"vt": values}}

    lm_eval = types.ModuleType("lm_eval")
    lm_eval.__spec__ = importlib.machinery.ModuleSpec("lm_eval", None)
    lm_eval.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    tasks = types.ModuleType("lm_eval.tasks")
    tasks.TaskManager = lambda metadata: metadata  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    huggingface = types.ModuleType("lm_eval.models.huggingface")
    huggingface.HFLM = lambda **options: options  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", lm_eval)
    monkeypatch.setitem(sys.modules, "lm_eval.models", types.ModuleType("lm_eval.models"))
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", huggingface)
    return calls


def test_tasks_run_on_both_models_in_batches(pair: Pair, harness: list[dict[str, Any]]) -> None:
    found = run_tasks(pair, ["vt"], limit=3, batch_size=4)
    assert found == {"base": {"vt": {"4096": 0.25}}, "converted": {"vt": {"4096": 0.25}}}
    for call, model in zip(harness, (pair.base, pair.converted), strict=True):
        assert (
            call["model"]["pretrained"] is model and call["model"]["batch_size"] == 4 and call["limit"] == 3
        )
        assert call["task_manager"] == {"pretrained": pair.path, "max_seq_lengths": [4096]}


def test_a_task_that_cannot_be_had_is_named(pair: Pair, harness: list[dict[str, Any]]) -> None:
    with pytest.raises(HyconvertError, match=r"unknown cannot be run \(KeyError"):
        run_tasks(pair, ["unknown"])


def test_ruler_is_refused_where_the_model_ends_too_early(
    pair: Pair, harness: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair.base.config, "max_position_embeddings", 2048)
    with pytest.raises(HyconvertError, match=r"ruler_vt has prompts of 4,096 tokens, .* ends at 2,048"):
        run_tasks(pair, ["hellaswag", "ruler_vt"])
    assert not harness and run_tasks(pair, ["hellaswag"])


def test_tasks_alone_measure_nothing_else(checkpoint: Path, harness: list[dict[str, Any]]) -> None:
    code, stdout, _ = run("eval", checkpoint, "--tasks", "vt", "--device", "cpu", "--json")
    data = json.loads(stdout)
    assert code == 0 and data["tasks"]["converted"]["vt"]["4096"] == 0.25 and data["text"] is None
    assert metrics_of({"results": {"a": {"acc,none": 0.5, "acc_stderr,none": 0.1}}}) == {"a": {"acc": 0.5}}


def test_a_task_of_ruler_runs_without_a_network(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the real harness, in batches. RULER would make 500 prompts, and asks for nltk data that this one needs not.

    To index all of the harness's 14,000 files takes longer than all the rest.
    """
    import nltk

    monkeypatch.setattr(nltk, "download", lambda name: False)
    import lm_eval.tasks
    from lm_eval.tasks.ruler import prepare_niah

    only = {"include_defaults": False, "include_path": Path(prepare_niah.__file__).parent}
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, **only))
    made = prepare_niah.generate_samples
    monkeypatch.setattr(
        prepare_niah, "generate_samples", lambda *args, **options: made(*args, **options | {"num_samples": 3})
    )
    widths = []
    handle = pair.converted.register_forward_pre_hook(
        lambda _, args, options: widths.append(options["input_ids"].shape), with_kwargs=True
    )
    try:
        found = run_tasks(pair, ["niah_single_1"], limit=3, batch_size=2)
    finally:
        handle.remove()
    assert found.keys() == {"base", "converted"} and all(
        0 <= x["niah_single_1"]["4096"] <= 1 for x in found.values()
    )
    prompts = [shape for shape in widths if shape[1] > 1]
    assert [shape[0] for shape in prompts] == [2, 1] and all(2000 < shape[1] <= 4096 for shape in prompts)


def test_an_answer_is_what_generate_gives_and_the_cache_goes_on(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer, pieces = pair.converted, pair.tokenizer, []
    monkeypatch.setattr(Speaker, "_pick", lambda _, logits: int(logits[3:98].argmax()) + 3)  # characters
    speaker = Speaker(model, tokenizer, max_new_tokens=12, temperature=0)
    speaker.messages.append({"role": "user", "content": "What is a block?"})
    prompt = torch.tensor([speaker._tokens()])
    answer = speaker.answer(pieces.append)
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 2,
        "suppress_tokens": [0, 1, 2, *range(98, 128)],
    }
    wanted = model.generate(prompt, **options)[0, prompt.shape[1] :]
    assert "".join(pieces) == answer == tokenizer.decode(wanted, skip_special_tokens=True)
    tokens, held = speaker.held
    assert held == sum(kv_bytes(model.config, tokens, dtype_bytes=4))
    lengths = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(args[0].shape[1]), with_kwargs=True
    )
    speaker.messages.append({"role": "user", "content": "And a window?"})
    again = speaker.answer(pieces.append)
    handle.remove()
    assert lengths[0] < len(speaker._tokens()) - tokens + 2  # what was cached is not read again
    fresh = Speaker(model, tokenizer, max_new_tokens=12, temperature=0)
    fresh.messages = speaker.messages[:-1]
    assert fresh.answer(lambda _: None) == again


@pytest.mark.parametrize("base", [False, True])
def test_chat_shows_the_kv_held(checkpoint: Path, base: bool, capsys: pytest.CaptureFixture[str]) -> None:
    said = iter(["Hello", "", "/new", "Hello", "/quit"])
    chat(str(checkpoint), base=base, max_new_tokens=3, device="cpu", read=lambda _: next(said))
    out, err = capsys.readouterr()
    names = ["base", "converted"] if base else ["converted"]
    assert err.count("of KV]") == 2 * len(names)
    assert ("base: " in out) == base and all(f"[{name}: " in err for name in names)


def test_chat_ends_with_the_input(checkpoint: Path) -> None:
    result = CliRunner().invoke(app, ["chat", str(checkpoint), "--device", "cpu"], input="Hi\n")
    assert result.exit_code == 0 and "of KV]" in result.stderr
