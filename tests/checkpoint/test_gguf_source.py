"""A GGUF file is read as the model it was made from. Transformers' own loader is the second witness."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize, quantize
from transformers import AutoModelForCausalLM, AutoTokenizer

from hyconvert.checkpoint import open_source
from hyconvert.checkpoint.gguf_config import tensor_name
from hyconvert.errors import CheckpointError, UnsupportedModelError
from tests.checkpoint.gguf_files import ARCHITECTURES, write_gguf


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for _, name, tensor in open_source(folder).iter_tensors()}


@pytest.fixture
def made(tiny_base, tmp_path: Path):
    """`made(family, **options)`: a GGUF file of a tiny model, that model's config and its weights."""

    def make(family: str = "llama", **options):
        overrides = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
        folder = tiny_base(family, **overrides)
        config, weights = open_source(folder).config, weights_of(folder)
        return write_gguf(tmp_path / "model.gguf", config, weights, **options), config, weights

    return make


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_names_layout_and_values_are_the_original_models(made, family: str) -> None:
    path, _, weights = made(family)
    source = open_source(path)
    assert set(source.tensor_names) == set(weights)
    for name, values in weights.items():
        assert torch.equal(source.read(name), torch.from_numpy(values)), name
        assert source.shapes[name] == values.shape
    assert source.format == "gguf (F32)"


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_config_is_the_original_models(made, family: str) -> None:
    path, original, _ = made(family)
    ours, theirs = open_source(path).config.to_dict(), original.to_dict()
    # Not stored in GGUF, and without effect on a trained model's outputs.
    for key in (
        "initializer_range",
        "transformers_version",
        "_name_or_path",
        "use_sliding_window",
        "sliding_window",
    ):
        ours.pop(key, None), theirs.pop(key, None)
    if family == "qwen3_moe":  # every layer of such a file is a mixture, so the dense width does not matter
        ours.pop("intermediate_size"), theirs.pop("intermediate_size")
    assert ours == theirs


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_the_same_weights(made, family: str) -> None:
    path, _, _ = made(family)
    witness = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, config=open_source(path).config
    )
    source = open_source(path)
    state = witness.state_dict()
    for name in source.tensor_names:
        assert torch.equal(source.read(name), state[name]), name


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_1", "Q8_0", "BF16", "F16"])
def test_quantised_tensors_are_read_as_the_values_they_stand_for(made, kind: str) -> None:
    quantization = GGMLQuantizationType[kind]
    path, _, weights = made("qwen3_moe", quantization=quantization)
    source = open_source(path)
    assert source.format == f"gguf ({kind})"
    assert source.dtype == torch.float32
    for name, values in weights.items():
        if values.ndim > 1:
            values = dequantize(quantize(values, quantization), quantization).astype(np.float32)
        assert torch.equal(source.read(name), torch.from_numpy(values)), name


def test_explicit_dtype_converts_what_is_read(made) -> None:
    path, _, weights = made("llama")
    source = open_source(path, dtype="bfloat16")
    assert source.dtype == source.config.dtype == torch.bfloat16
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(source.read(name), torch.from_numpy(weights[name]).bfloat16())
    assert source.nbytes == 2 * sum(values.size for values in weights.values())


def test_large_files_are_cut_into_shards(made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyconvert.checkpoint.gguf._SHARD_BYTES", 200_000)
    path, _, weights = made("llama")
    source = open_source(path)
    total = len(source.shards)
    assert total > 3
    assert [shard.name for shard in source.shards] == [
        f"model-{index:05d}-of-{total:05d}.safetensors" for index in range(1, total + 1)
    ]
    assert all(shard.nbytes <= 200_000 for shard in source.shards)
    assert {name for _, tensors in source.iter_shards() for name in tensors} == set(weights)


def llama3_factors(head_dim: int, factor: float) -> np.ndarray:
    """What llama.cpp's converter stores for Llama 3's RoPE scaling, in its own words."""
    factors = []
    for frequency in 1.0 / 10000.0 ** (np.arange(0, head_dim, 2) / head_dim):
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


def test_llama3_rope_scaling_is_recovered(made) -> None:
    path, _, _ = made("llama", extra_tensors={"rope_freqs.weight": llama3_factors(16, 32.0)})
    source = open_source(path)
    assert source.config.rope_parameters == {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert not any("rope" in name for name in source.tensor_names)


def test_yarn_rope_scaling_is_recovered(made) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_context_length": 128}
    path, _, _ = made(
        "qwen3", extra_metadata={f"qwen3.rope.scaling.{key}": value for key, value in scaling.items()}
    )
    rope = open_source(path).config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4.0, 128)


def test_end_of_turn_token_ends_generation_too(made) -> None:
    path, _, _ = made("llama", extra_metadata={"tokenizer.ggml.eot_token_id": 0})
    assert open_source(path).config.eos_token_id == [0, 2]
    generation = json.loads(open_source(path).auxiliary_files()["generation_config.json"])
    assert generation["eos_token_id"] == [0, 2]


REFUSED = [
    (
        {"extra_tensors": {"rope_freqs.weight": np.linspace(1, 7, 8, dtype=np.float32)}},
        "scales RoPE in a way",
    ),
    ({"extra_metadata": {"llama.rope.scaling.type": "longrope"}}, "scales RoPE in a way .longrope."),
    ({"extra_tensors": {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}}, "'blk.0.attn_sinks.weight'"),
    ({"extra_tensors": {"mm.proj": np.ones(4, np.float32)}}, "the tensor 'mm.proj'"),
    ({"extra_metadata": {"llama.expert_count": 8}}, "Mixtral"),
    ({"extra_metadata": {"split.count": 3}}, "one part of a split GGUF"),
]


@pytest.mark.parametrize(("options", "expected"), REFUSED)
def test_what_would_change_the_model_silently_is_refused(made, options: dict, expected: str) -> None:
    path, _, _ = made("llama", **options)
    with pytest.raises(UnsupportedModelError, match=expected) as caught:
        open_source(path)
    assert str(path) in str(caught.value)


def test_unknown_architecture_is_refused_with_the_known_ones(made) -> None:
    path, _, _ = made("llama", architecture="mamba")
    with pytest.raises(
        UnsupportedModelError, match=r"architecture 'mamba'; .* llama, qwen2, qwen3, qwen3moe"
    ):
        open_source(path)


def test_unknown_splitting_rules_are_refused(made) -> None:
    path, _, _ = made("llama", pre="deepseek-llm")
    with pytest.raises(UnsupportedModelError, match=r"tokenizer.ggml.pre = 'deepseek-llm'"):
        open_source(path).load_tokenizer()


TEXTS = ["\n\n2", "don'T don't", "a 1234", "x\n\n  y", "(é=1)!/\n", "e\u0301"]
SPLITS = {  # by the rules in the tokenizer.json that the families publish
    "smollm": ["ĊĊ|2", "don|'|T|Ġdon|'t", "a|Ġ|1|2|3|4", "x|ĊĊĠ|Ġy", "(|Ã©|=|1|)!/|Ċ", "e|Ìģ"],
    "gpt-2": ["Ċ|Ċ|2", "don|'|T|Ġdon|'t", "a|Ġ1234", "x|ĊĊĠ|Ġy", "(|Ã©|=|1|)!/|Ċ", "e|Ìģ"],
    "llama-bpe": ["ĊĊ|2", "don|'T|Ġdon|'t", "a|Ġ|123|4", "x|ĊĊ|Ġ|Ġy", "(Ã©|=|1|)!/Ċ", "e|Ìģ"],
    "qwen2": ["ĊĊ|2", "don|'T|Ġdon|'t", "a|Ġ|1|2|3|4", "x|ĊĊ|Ġ|Ġy", "(Ã©|=|1|)!/Ċ", "Ã©"],
    "tekken": ["ĊĊ|2", "don|'T|Ġdon|'t", "a|Ġ|1|2|3|4", "x|ĊĊ|Ġ|Ġy", "(Ã©|=|1|)!/Ċ", "eÌģ"],
}


@pytest.mark.parametrize("pre", SPLITS)
def test_text_is_split_by_the_rules_that_the_file_names(made, pre: str) -> None:
    path, _, _ = made("llama", pre=pre)
    backend = open_source(path).load_tokenizer().backend_tokenizer
    for text, expected in zip(TEXTS, SPLITS[pre], strict=True):
        normal = backend.normalizer.normalize_str(text) if backend.normalizer else text
        assert "|".join(part for part, _ in backend.pre_tokenizer.pre_tokenize_str(normal)) == expected


@pytest.mark.parametrize(
    ("pre", "says", "begins"),
    [("smollm", None, False), ("smollm", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False)],
)
def test_text_begins_with_the_begin_token_where_llama_cpp_adds_it(
    made, tmp_path: Path, pre: str, says: bool | None, begins: bool
) -> None:
    extra = {} if says is None else {"tokenizer.ggml.add_bos_token": says}
    path, _, _ = made("llama", pre=pre, extra_metadata=extra)
    source = open_source(path)
    saved = tmp_path / "saved"
    saved.mkdir()
    for name, data in source.auxiliary_files().items():
        (saved / name).write_bytes(data)
    for tokenizer in (source.load_tokenizer(), AutoTokenizer.from_pretrained(saved)):
        assert (tokenizer("a").input_ids[0] == 1) is begins
        assert tokenizer("a", add_special_tokens=False).input_ids == [tokenizer.convert_tokens_to_ids("a")]


@pytest.mark.parametrize("keep", [10, 40, 500, -1])
def test_truncated_file_is_refused(made, keep: int) -> None:
    path, _, _ = made("llama")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"is truncated.*download it again") as caught:
        open_source(path)
    assert "\n" not in str(caught.value)


def test_file_without_the_magic_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGML" + bytes(100))
    with pytest.raises(CheckpointError, match="is no GGUF file"):
        open_source(path)


def test_fingerprint_depends_on_the_contents_alone(made, tmp_path: Path) -> None:
    path, _, _ = made("llama")
    fingerprint = open_source(path).fingerprint
    other = tmp_path / "other-name.gguf"
    other.write_bytes(path.read_bytes())
    assert open_source(other, dtype="float16").fingerprint == fingerprint
    other.write_bytes(path.read_bytes()[:-4] + b"\1\2\3\4")
    assert open_source(other).fingerprint != fingerprint


def test_bias_and_expert_names() -> None:
    path = Path("x.gguf")
    assert tensor_name(path, "blk.3.attn_q.bias") == "model.layers.3.self_attn.q_proj.bias"
    assert (
        tensor_name(path, "blk.12.ffn_up_exps.weight")
        == "model.layers.12.mlp.experts.{expert}.up_proj.weight"
    )


# The real model.


def test_smollm2_weights_are_bit_for_bit_those_transformers_reads(smollm2_gguf: Path) -> None:
    source = open_source(smollm2_gguf)
    witness = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    state = witness.state_dict()
    assert set(state) - set(source.tensor_names) == {"lm_head.weight"}  # tied
    for _, name, tensor in source.iter_tensors():
        assert torch.equal(tensor, state[name]), name
    ours, theirs = source.config.to_dict(), witness.config.to_dict()
    assert theirs.pop("rms_norm_eps") == pytest.approx(ours.pop("rms_norm_eps"), rel=1e-7)
    for key in (
        "_name_or_path",
        "_model_name_or_path",
        "architectures",
        "dtype",
        "unk_token_id",
        "quantization_config",
    ):
        ours.pop(key, None), theirs.pop(key, None)
    assert ours == theirs


def test_smollm2_tokenizer_survives_saving(smollm2_gguf: Path, tmp_path: Path) -> None:
    source = open_source(smollm2_gguf)
    tokenizer = source.load_tokenizer()
    for name, data in source.auxiliary_files().items():
        (tmp_path / name).write_bytes(data)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    texts = [
        "In 2024\n\n3. foo  12",
        "<|im_start|>user\nHi<|im_end|>\n",
        "x = [1,  22,\n    333]\t# don't I'll",
        "é漢字 🙂 ½ ² \r\n ",
        "",
    ]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert saved(text).input_ids == ids
        assert saved.decode(ids) == text
    assert saved.model_max_length == 8192
    assert (saved.bos_token, saved.eos_token, saved.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    prompt = saved.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert saved(prompt).input_ids.count(1) == 3  # system, user, assistant: each marker is one token


def test_smollm2_splits_digits_and_whitespace_as_it_was_trained(smollm2_gguf: Path) -> None:
    tokenizer = open_source(smollm2_gguf).load_tokenizer()
    assert tokenizer.tokenize("In 2024\n\n3") == ["In", "Ġ", "2", "0", "2", "4", "ĊĊ", "3"]
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]


def test_smollm2_reads_real_text_well(smollm2_gguf: Path) -> None:
    from pydoc_data.topics import topics

    source = open_source(smollm2_gguf)
    model = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32).eval()
    model.load_state_dict({name: tensor for _, name, tensor in source.iter_tensors()}, strict=False)
    ids = torch.tensor([source.load_tokenizer()("\n".join(topics.values())[:12_000]).input_ids[:2048]])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    assert ids.shape == (1, 2048)
    assert loss.exp().item() < 14  # 11.9 with Python 3.11's text
