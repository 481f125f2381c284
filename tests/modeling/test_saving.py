"""Checkpoints: what is written loads completely, whichever way, and writing it again gives the same files."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from hyconvert.modeling import HyConvertConfig, HyConvertForCausalLM
from hyconvert.plan import Plan
from tests.modeling.tiny import (
    FAMILY_NAMES,
    MIXED,
    base_config,
    base_model,
    converted,
    mixed_model,
    plan_of,
    tokens,
)

every_family = pytest.mark.parametrize("family", FAMILY_NAMES)
ROOT = Path(__file__).parents[2]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(tokens(2, 33)).logits


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def tensor_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            names.update(shard.keys())
    return names


@every_family
def test_saved_loaded_and_saved_again_is_the_same_to_the_byte(family: str, tmp_path: Path) -> None:
    model = mixed_model(family, sinks=True)
    model.save_pretrained(tmp_path / "a")
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert {key: value for key, value in report.items() if value} == {}
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


@every_family
def test_a_base_loads_as_converted_and_only_what_was_added_is_new(family: str, tmp_path: Path) -> None:
    base = base_model(family)
    base.save_pretrained(tmp_path / "base")
    config = HyConvertConfig.from_base(base.config, plan_of(MIXED))
    model, report = HyConvertForCausalLM.from_pretrained(
        tmp_path / "base", config=config, output_loading_info=True
    )
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    added = {"gate.weight", "gate.bias", "query_map", "value_map"}
    assert {name.split("self_attn.")[1] for name in report["missing_keys"]} == added
    assert torch.equal(logits(model), logits(converted(base, plan_of(MIXED), stirred=False)))
    model.save_pretrained(tmp_path / "converted")
    before = load_file(tmp_path / "base" / "model.safetensors")
    after = load_file(tmp_path / "converted" / "model.safetensors")
    assert set(after) - set(before) == set(report["missing_keys"])
    for name, weight in before.items():
        assert torch.equal(after[name], weight), name


def test_experts_are_stored_one_by_one_as_the_base_stores_them(tmp_path: Path) -> None:
    mixed_model("qwen3_moe").save_pretrained(tmp_path)
    names = tensor_names(tmp_path)
    assert "model.layers.0.mlp.experts.3.down_proj.weight" in names
    assert not any(name.endswith("experts.down_proj") for name in names)


def test_every_way_of_loading_gives_the_same_logits(tmp_path: Path) -> None:
    model = mixed_model("qwen3")
    model.save_pretrained(tmp_path / "saved")
    want = logits(model)
    assert torch.equal(logits(HyConvertForCausalLM.from_pretrained(tmp_path / "saved")), want)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), want)
    torch.save({"ids": tokens(2, 33), "logits": want}, tmp_path / "want.pt")
    script = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
assert not any(name.startswith("hyconvert") for name in sys.modules)
folder, again, want = sys.argv[1:]
want = torch.load(want)
for _ in range(2):
    model, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        assert torch.equal(model.eval()(want["ids"]).logits, want["logits"])
    model.save_pretrained(again)
    folder = again
assert AutoConfig.from_pretrained(again, trust_remote_code=True).to_dict() == model.config.to_dict()
"""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in (*sys.path, str(ROOT), str(ROOT / "kernels")) if path),
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    arguments = [str(tmp_path / name) for name in ("saved", "again", "want.pt")]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "saved") == files(tmp_path / "again")


def test_shards_load_completely_and_stay_the_same(tmp_path: Path) -> None:
    model = mixed_model("qwen3_moe")
    model.save_pretrained(tmp_path / "a", max_shard_size="40KB")
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 3
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "b", max_shard_size="40KB")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_weight_variants_load(tmp_path: Path) -> None:
    model = mixed_model()
    model.save_pretrained(tmp_path, variant="fp32")
    assert (tmp_path / "model.fp32.safetensors").exists()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path, variant="fp32")), logits(model))


def test_tied_embeddings_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    model = converted(base_model("llama", tie_word_embeddings=True), plan_of(MIXED))
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in tensor_names(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded), logits(model))


@torch.no_grad()
def test_bfloat16_is_stored_loaded_and_run(tmp_path: Path) -> None:
    model = mixed_model("qwen3", sinks=True).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    assert logits(loaded).dtype == torch.bfloat16
    as_float = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    difference = (logits(as_float) - logits(loaded).float()).pow(2).mean().sqrt()
    assert difference < 0.05 * logits(as_float).pow(2).mean().sqrt()


@every_family
def test_the_config_comes_back_as_it_was(family: str, tmp_path: Path) -> None:
    base, plan = base_config(family), plan_of(MIXED, sinks=True, gate="sigmoid", base="tiny", note="a test's")
    config = HyConvertConfig.from_base(base, plan)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    assert isinstance(loaded, type(base))
    assert loaded.get_plan() == plan
    assert loaded.to_dict() == config.to_dict()
    assert loaded.cache_windows == [None, 6, None, 6, None, 6, None]
    again = type(base).from_dict(loaded.base_dict())
    assert again.to_dict() == type(base).from_dict(base.to_dict()).to_dict()


def test_config_json_nests_base_and_plan_and_names_the_shim(tmp_path: Path) -> None:
    mixed_model("qwen3").save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    assert data["model_type"] == "hyconvert"
    assert data["architectures"] == ["HyConvertQwen3ForCausalLM"]
    assert data["base_config"]["model_type"] == "qwen3"
    assert Plan.from_dict(data["plan"]) == Plan.load(tmp_path / "plan.json") == plan_of(MIXED)
    module, name = data["auto_map"]["AutoModelForCausalLM"].split(".")
    assert f"import HyConvertQwen3Config, {name}" in (tmp_path / f"{module}.py").read_text()


def test_generation_settings_of_the_base_are_kept(tmp_path: Path) -> None:
    base = base_model("llama", eos_token_id=[2, 5])
    base.generation_config = GenerationConfig(
        eos_token_id=[2, 5], bos_token_id=1, pad_token_id=0, top_k=7, do_sample=True
    )
    base.save_pretrained(tmp_path / "base")
    config = HyConvertConfig.from_base(base.config, plan_of(MIXED))
    model = HyConvertForCausalLM.from_pretrained(tmp_path / "base", config=config)
    model.save_pretrained(tmp_path / "converted")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    assert loaded.generation_config.to_diff_dict() == base.generation_config.to_diff_dict()
    assert loaded.config.eos_token_id == [2, 5]
    assert (tmp_path / "base" / "generation_config.json").read_bytes() == (
        tmp_path / "converted" / "generation_config.json"
    ).read_bytes()


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_models_and_configs_can_be_copied_and_pickled(family: str) -> None:
    model = mixed_model(family, sinks=True)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(clone), logits(model))
        assert clone.config.to_dict() == model.config.to_dict()
    for config in (
        copy.deepcopy(model.config),
        copy.copy(model.config),
        pickle.loads(pickle.dumps(model.config)),
    ):
        assert type(config) is type(model.config)
        assert config.to_dict() == model.config.to_dict()
        assert config.cache_windows == model.config.cache_windows


def test_a_changed_copy_leaves_the_original_alone() -> None:
    model = mixed_model()
    before = logits(model)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    assert torch.equal(logits(model), before)


def test_a_model_can_be_made_from_its_config_alone() -> None:
    config = HyConvertConfig.from_base(base_config("olmo2"), plan_of(MIXED, sinks=True))
    model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, HyConvertForCausalLM)
    attention = model.model.layers[1].self_attn
    assert torch.equal(attention.query_map, torch.eye(8).expand(4, -1, -1))
    assert attention.gate.weight.abs().max() == 0
    assert torch.equal(attention.window_sink, torch.full((4,), -30.0))
    assert logits(model).isfinite().all()
