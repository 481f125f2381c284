"""What converted models do not do is refused in words, not done wrongly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config

from hyconvert.errors import CheckpointError, PlanError, UnsupportedModelError
from hyconvert.modeling import HyConvertConfig, HyConvertForCausalLM, family_of
from tests.modeling.tiny import EXACT, base_config, mixed_model, plan_of, tokens


@pytest.fixture(scope="module")
def model() -> Any:
    return mixed_model()


@pytest.mark.parametrize("name", ["flash_attention_2", "eager", "sdpa", "flex_attention"])
def test_attention_of_other_makers_is_refused(name: str, tmp_path: Any, model: Any) -> None:
    message = f"attn_implementation='{name}' is not available: converted models have attention of their own"
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
    with pytest.raises(ValueError, match=message):
        mixed_model().set_attn_implementation(name)


def test_the_reference_can_be_asked_for(tmp_path: Any, model: Any) -> None:
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="hyconvert_reference").eval()
    assert {layer.self_attn.implementation for layer in loaded.model.layers} == {"reference"}
    assert loaded.model.layers[1].self_attn.gate is not None
    ids = tokens(2, 33)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    loaded.set_attn_implementation("hyconvert")
    assert loaded.model.layers[0].self_attn.implementation is None


def test_the_choice_of_kernels_is_not_stored(tmp_path: Any, model: Any) -> None:
    model.save_pretrained(tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a", attn_implementation="hyconvert_reference")
    loaded.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a" / "config.json").read_bytes() == (tmp_path / "b" / "config.json").read_bytes()


def test_four_dimensional_masks_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"take a 2-D attention mask .* not one of shape \(1, 1, 8, 8\)"):
        model(tokens(1, 8), attention_mask=torch.ones(1, 1, 8, 8))


@pytest.mark.parametrize("mask", [[1, 1, 0, 1, 1], [0, 1, 0, 0, 1], [1, 0, 0, 0, 1]])
def test_padding_inside_a_sequence_is_refused(mask: list[int], model: Any) -> None:
    with pytest.raises(ValueError, match="padding between two stretches of real tokens"):
        model(tokens(1, 5), attention_mask=torch.tensor([mask]))


def test_decoding_after_right_padding_is_refused(model: Any) -> None:
    ids = tokens(1, 9)
    cache = DynamicCache(config=model.config)
    mask = torch.tensor([[1] * 6 + [0] * 3])
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        grown = torch.cat([mask, torch.ones(1, 1, dtype=torch.long)], 1)
        with pytest.raises(ValueError, match="padding between two stretches of real tokens"):
            model(tokens(1, 1), attention_mask=grown, past_key_values=cache)


def test_a_mask_of_the_new_tokens_alone_is_refused(model: Any) -> None:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(1, 9), past_key_values=cache)
        with pytest.raises(ValueError, match="mask covers 2 tokens, but 9 are cached and 2 are new"):
            model(tokens(1, 2), attention_mask=torch.ones(1, 2), past_key_values=cache)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masks_of_any_number_type_are_read(dtype: torch.dtype, model: Any) -> None:
    mask = torch.ones(1, 12)
    mask[:, :5] = 0
    with torch.no_grad():
        logits = model(tokens(1, 12), attention_mask=mask.to(dtype)).logits[:, 5:]
        torch.testing.assert_close(logits, model(tokens(1, 12)[:, 5:]).logits, **EXACT)


def test_a_layer_outside_its_model_is_refused(model: Any) -> None:
    with pytest.raises(RuntimeError, match="call the model, not its layers"):
        model.model.layers[0](torch.zeros(1, 4, 32))


def test_attention_weights_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="never hold attention weights"):
        model(tokens(1, 8), output_attentions=True)


def test_hidden_states_are_given(model: Any) -> None:
    with torch.no_grad():
        out = model(tokens(1, 8), output_hidden_states=True)
    assert len(out.hidden_states) == 8


@pytest.mark.parametrize("name", ["gpt2", "deepseek_v3", "mamba", "t5", "gemma3"])
def test_other_families_are_refused_by_name_with_those_that_can(name: str) -> None:
    with pytest.raises(
        UnsupportedModelError, match=f"'{name}' cannot be converted; hyconvert converts Llama, Mistral, "
    ):
        family_of(name)


def test_a_config_of_another_family_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="'gpt2' cannot be converted"):
        HyConvertConfig.from_base(GPT2Config(), plan_of("F S0"))


def test_a_converted_model_is_not_converted_again(model: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="it is converted already"):
        HyConvertConfig.from_base(model.config, plan_of("F S0"))


@pytest.mark.parametrize("line", ["F S0 F", "F S0*7"])
def test_a_plan_of_another_depth_is_refused(line: str) -> None:
    with pytest.raises(PlanError, match=r"the plan has \d layers, but the model has 7"):
        HyConvertConfig.from_base(base_config("llama"), plan_of(line))


def test_a_config_without_its_base_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no 'base_config'"):
        HyConvertConfig.from_dict({"model_type": "hyconvert", "plan": {"layers": [{"kind": "full"}]}})


def test_a_spoilt_plan_in_config_json_is_named(tmp_path: Any, model: Any) -> None:
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"source": 4', '"source": 6'))
    with pytest.raises(PlanError, match=r"config.json: plan: .*layer 5 names source 6"):
        HyConvertForCausalLM.from_pretrained(tmp_path)


def test_unknown_names_of_the_package_are_attribute_errors() -> None:
    import hyconvert.modeling as modeling

    assert modeling.HyConvertQwen3Config.__name__ == "HyConvertQwen3Config"
    for module in (modeling, modeling.configuration, modeling.model):
        with pytest.raises(AttributeError, match="HyConvertGPT2ForCausalLM"):
            _ = module.HyConvertGPT2ForCausalLM
