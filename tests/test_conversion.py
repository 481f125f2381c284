"""Conversion end to end on tiny models of every family."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import hyconvert
from hyconvert.conversion import Calibration, convert
from hyconvert.errors import CheckpointError, DataError, PlanError, UnsupportedModelError

SMALL = {"block_size": 16, "topk": 2, "window": 16}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (3000,), generator=generator).tolist()
    path.write_text("".join(map(chr, letters)))
    return str(path)


def small(text: str) -> Calibration:
    return Calibration(source=text, tokens=512, sequence_length=64)


def stored(folder: Path) -> dict[str, bytes]:
    """Raw bytes of every tensor of a checkpoint."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (no mapping, only like one)
                found[name] = file.get_tensor(name).contiguous().view(torch.uint8).numpy().tobytes()
    return found


def test_untouched_tensors_are_byte_identical(
    tiny_base: Callable[..., Path], family: str, tmp_path: Path, text: str
) -> None:
    base = tiny_base(family, dtype=torch.bfloat16, max_shard_size="100KB")
    report = convert(base, tmp_path / "out", plan="F S0 W F", calibration=small(text), device="cpu", **SMALL)
    before, after = stored(base), stored(tmp_path / "out")
    assert set(before) <= set(after)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {f"model.layers.{i}.self_attn.o_proj.weight" for i in (1, 2)}
    assert {name.split("self_attn.")[1] for name in set(after) - set(before)} == {
        "query_map", "value_map", "gate.weight", "gate.bias",
    }  # fmt: skip
    assert report.perplexity.keys() == {"base", "converted"}


def test_a_conversion_loads_three_ways_and_generates(
    tiny_base: Callable[..., Path], family: str, tmp_path: Path, text: str
) -> None:
    out = tmp_path / "out"
    convert(tiny_base(family), out, uniform=1, calibration=small(text), device="cpu", **SMALL)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = AutoTokenizer.from_pretrained(out)("the layers that remain", return_tensors="pt").input_ids
    other = hyconvert.load(out, device="cpu")
    remote = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
    with torch.no_grad():
        logits = model.eval()(tokens).logits
        assert torch.equal(logits, other(tokens).logits)
        assert torch.equal(logits, remote(tokens).logits)
        assert other.generate(tokens, max_new_tokens=5, do_sample=False).shape[1] > tokens.shape[1]


def test_the_folder_says_how_it_was_made(tiny_base: Callable[..., Path], tmp_path: Path, text: str) -> None:
    base, out = tiny_base("llama"), tmp_path / "out"
    convert(
        base,
        out,
        plan="F*2 S1 W",
        calibration=small(text),
        command="hyconvert convert x",
        device="cpu",
        **SMALL,
    )
    card = (out / "README.md").read_text()
    for fact in ("F*2 S1 W", "hyconvert convert x", "Perplexity on held-out", "| 131,072 |", "sha256:"):
        assert fact in card, fact
    assert hyconvert.Plan.load(out / "plan.json").line == "F*2 S1 W"
    assert json.loads((out / "conversion.json").read_text())["perplexity"]["base"] > 1
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert "modeling_hyconvert.py" in names


def test_without_alignment_the_new_parameters_are_identities(
    tiny_base: Callable[..., Path], tmp_path: Path
) -> None:
    base, out = tiny_base("llama"), tmp_path / "out"
    convert(base, out, plan="F S0 W F", align_layers=False, sinks=True, **SMALL)
    before, after = stored(base), stored(out)
    assert all(after[name] == data for name, data in before.items())
    attention = hyconvert.load(out).model.layers[1].self_attn
    assert torch.equal(attention.query_map, torch.eye(16).expand(6, -1, -1))
    assert not attention.gate.weight.any() and not attention.gate.bias.any()


def test_conversion_is_reproducible(tiny_base: Callable[..., Path], tmp_path: Path, text: str) -> None:
    for name in ("a", "b"):
        convert(
            tiny_base("qwen3"), tmp_path / name, uniform=2, calibration=small(text), device="cpu", **SMALL
        )
    assert stored(tmp_path / "a") == stored(tmp_path / "b")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan": "F*4", "kv_budget": 0.5}, "nothing to choose"),
        ({"uniform": 2, "plan": "F*4"}, "contradict"),
        ({"full_layers": [0, 9]}, r"full layers \[9\] do not exist"),
        ({"plan": "S0 F*3"}, "layer 0"),
        ({"plan": "F S2 F F"}, "must come before"),
        ({"plan": "F*3"}, "has 3 layers, but the model has 4"),
        ({"plan": "F*4", "topk": 0}, "topk"),
        ({"plan": "F*4", "window": 0}, "window"),
        ({"plan": "F*4", "block_size": 24}, "power of two"),
        ({"plan": "F*4", "block_size": 1024}, "longer than the 512 tokens"),
        ({"plan": "L F*3"}, "full attention there"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_before_anything_is_written(
    tiny_base: Callable[..., Path], tmp_path: Path, options: dict, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        convert(tiny_base("llama"), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_an_unknown_family_is_refused_with_the_list(tmp_path: Path) -> None:
    base = tmp_path / "base"
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64)).save_pretrained(base)
    with pytest.raises(UnsupportedModelError, match=r"'gpt2' cannot be converted.*Llama, Mistral"):
        convert(base, tmp_path / "out", uniform=1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        pytest.param({"num_key_value_heads": 4}, r"0\.self_attn\.k_proj\.weight is \[", id="more KV heads"),
        pytest.param({"intermediate_size": 40}, r"mlp\.gate_proj\.weight is \[", id="narrower MLP"),
        pytest.param({"num_hidden_layers": 3}, r"hold model\.layers\.3\..* does not know", id="fewer layers"),
        pytest.param({"num_hidden_layers": 5}, r"wants model\.layers\.4\.self_attn\..* lack", id="layers"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused(
    tiny_base: Callable[..., Path], tmp_path: Path, changes: dict[str, int], said: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base("llama"), base)
    config = json.loads((base / "config.json").read_text())
    config.pop("layer_types", None)
    (base / "config.json").write_text(json.dumps(config | changes))
    plan = "F S0" + " W" * (changes.get("num_hidden_layers", 4) - 2)
    with pytest.raises(CheckpointError, match=said):
        convert(base, tmp_path / "out", plan=plan, align_layers=False, device="cpu", **SMALL)
    assert not (tmp_path / "out").exists()


def test_a_base_whose_layers_all_slide_is_refused(tiny_base: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="already has a sliding window of 32"):
        convert(tiny_base("mistral", sliding_window=32), tmp_path / "out", uniform=1)


def test_own_sliding_layers_are_kept(tiny_base: Callable[..., Path], tmp_path: Path, text: str) -> None:
    base = tiny_base("qwen2", use_sliding_window=True, sliding_window=32, max_window_layers=2)
    report = convert(base, tmp_path / "out", full_layers=[0], calibration=small(text), device="cpu", **SMALL)
    assert report.plan.line == "F S0 L*2"


def test_short_or_missing_text_is_refused(tiny_base: Callable[..., Path], tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too little")
    for source, message in (
        (str(short), "fewer than one sequence"),
        (str(tmp_path / "no.txt"), "no file or folder"),
    ):
        with pytest.raises(DataError, match=message):
            convert(tiny_base("llama"), tmp_path / "out", uniform=1, calibration=Calibration(source=source))
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_kept_without_force(tiny_base: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(tiny_base("llama"), out, uniform=1, align_layers=False)
    before = stored(out)
    with pytest.raises(CheckpointError, match="--force"):
        convert(tiny_base("llama"), out, uniform=2, align_layers=False)
    assert stored(out) == before
    convert(tiny_base("llama"), out, uniform=2, align_layers=False, force=True)
    assert hyconvert.Plan.load(out / "plan.json").line == "F S0*2 F"


def test_sequences_of_the_default_length_fit_the_base(
    tiny_base: Callable[..., Path], tmp_path: Path, text: str
) -> None:
    report = convert(
        tiny_base("llama"),
        tmp_path / "out",
        uniform=1,
        calibration=Calibration(source=text, tokens=512),
        **SMALL,
    )
    assert report.calibration is not None and report.calibration.sequence_length == 512


def test_sequences_longer_than_the_base_knows_are_refused(
    tiny_base: Callable[..., Path], tmp_path: Path, text: str
) -> None:
    calibration = Calibration(source=text, sequence_length=1024)
    with pytest.raises(DataError, match="1024 tokens are longer than the 512"):
        convert(tiny_base("llama"), tmp_path / "out", uniform=1, calibration=calibration)
    assert not (tmp_path / "out").exists()
