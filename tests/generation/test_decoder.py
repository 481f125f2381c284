"""The decode loop writes what transformers' generate writes, in caches of exactly the counted size."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hyconvert.errors import HyconvertError, UnsupportedModelError
from hyconvert.generation import Decoder, Sampling, generate
from hyconvert.generation.decoder import PASS_ELEMENTS, prompt_room
from hyconvert.generation.network import FusedMlp, read_network
from hyconvert.kv import base_kv_bytes, kv_bytes
from hyconvert_kernels.configs import HOPPER_ROWS, takes_over_from
from tests.modeling.tiny import FAMILY_NAMES, base_model, converted, mixed_model, plan_of, tokens

PROMPT, NEW = 27, 13
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}


def padded(batch: int = 3, length: int = PROMPT) -> tuple[Tensor, Tensor]:
    """Prompts [B, T] with 0, 9 and 20 tokens of padding, and their mask."""
    ids = tokens(batch, length)
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 9, 20)):
        mask[row, :pad] = 0
    return ids, mask


def check(model: Any, **options: Any) -> None:
    ids, mask = padded()
    want = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(generate(model, ids, mask, max_new_tokens=NEW, eos_token_id=[], **options), want)
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), want), (
        "the model itself was changed"
    )


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_greedy_tokens_are_transformers_in_every_family(family: str) -> None:
    check(mixed_model(family))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_greedy_tokens_of_a_dense_model_are_transformers(family: str) -> None:
    check(base_model(family))


@pytest.mark.parametrize(
    ("line", "settings"),
    [
        ("F*7", {}),
        ("W*7", {}),
        ("F S0*5 F", {"window": 40}),
        ("W F S1 R1 S1 W W", {"sinks": True}),
        ("F R0*2 F S3 W F", {"gate": "sigmoid"}),
        ("F R0*2 F S3*3", {"gate": "sigmoid", "maps": True}),
        ("F S0 R0 W F S4 F", {"block_size": 1, "topk": 5, "window": 2}),
    ],
    ids=str,
)
def test_greedy_tokens_are_transformers_under_every_plan(line: str, settings: dict[str, Any]) -> None:
    check(mixed_model(line=line, **settings))


@pytest.mark.parametrize("pieces", [2, 6])
@pytest.mark.parametrize(
    ("line", "settings"),
    [
        ("F S0 R0 W F S4 F", {}),
        ("F S0 R0 W F S4 W", {"gate": "sigmoid", "maps": True, "sinks": True}),
        ("F S0 R0 F F S4 S4", {"window": 40}),
        ("W F S1 R1 S1 W R1", {"block_size": 1, "topk": 5, "window": 2}),
    ],
    ids=str,
)
def test_long_prompts_are_read_in_pieces(
    line: str, settings: dict[str, Any], pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hyconvert.generation.decoder.PASS_TOKENS", -(-PROMPT // pieces))
    check(mixed_model(line=line, **settings))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_family_reads_prompts_in_pieces(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyconvert.generation.decoder.PASS_TOKENS", 10)
    check(mixed_model(family))


def test_a_piece_of_one_token_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyconvert.generation.decoder.PASS_TOKENS", 1)
    check(mixed_model())


@pytest.mark.parametrize("pass_tokens", [100, 10])
@pytest.mark.parametrize("line", ["L*4 F S4 F", "L F S1 L W R1 L"])
def test_greedy_tokens_are_transformers_with_sliding_layers_of_the_base(
    line: str, pass_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hyconvert.generation.decoder.PASS_TOKENS", pass_tokens)
    kinds = ["sliding_attention" if token == "L" else "full_attention" for token in plan_kinds(line)]
    base = base_model("qwen2", sliding_window=11, use_sliding_window=True, layer_types=kinds)
    check(base)
    check(converted(base, plan_of(line)))


def plan_kinds(line: str) -> list[str]:
    return [str(layer) for layer in plan_of(line).layers]


@pytest.mark.parametrize("length", [1, 2, 5, 7])
def test_short_prompts(length: int) -> None:
    model, ids = mixed_model(), tokens(2, length)
    want = model.generate(ids, **GREEDY)
    assert torch.equal(generate(model, ids, max_new_tokens=NEW, eos_token_id=[]), want)


def test_a_decoder_serves_prompt_after_prompt() -> None:
    model = mixed_model()
    decoder = Decoder(model, batch=3, max_length=64)
    for length in (40, 9, 21):
        ids = tokens(3, length, seed=length)
        assert torch.equal(decoder.generate(ids, max_new_tokens=NEW), model.generate(ids, **GREEDY))


class FilledUp(Decoder):
    """Reads prompts as CUDA graphs do, filled up to the room that they have, without a GPU."""

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__(model, graph=True, **options)

    def _read_graphed(self, ids: Tensor, rows: slice, padded: bool) -> Tensor:
        length = ids.shape[1]
        room = prompt_room(length, self.max_length)
        filled = torch.cat([ids, tokens(len(ids), room, seed=room)[:, length:]], 1)
        return self._read_filled(filled, torch.tensor([length - 1]), rows, padded)

    def _capture(self) -> None:
        """Steps go on one by one."""


class Captured:
    """Stands in for a CUDA graph of prompts: a replay reads again what lies in its inputs."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.replays = decoder, 0

    def replay(self) -> None:
        self.replays += 1
        logits = self.decoder._read_filled(*self.arguments)
        (mine,) = (known for known in self.decoder._prompts.values() if known.graph is self)
        mine.logits.copy_(logits)

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """What is read meanwhile is noted, and its logits are not there yet."""
        read = self.decoder._read_filled

        def note(*arguments: Any) -> Tensor:
            self.arguments = arguments
            return torch.full_like(read(*arguments), torch.nan)

        self.decoder._read_filled = note
        yield
        del self.decoder._read_filled


@pytest.mark.parametrize("pass_tokens", [1000, 80, 40])
def test_rows_that_do_not_pass_at_once_have_graphs_of_their_own(
    pass_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hyconvert.generation.decoder.PASS_TOKENS", pass_tokens)
    model = mixed_model(line="F S0 R0 W F S4 F")
    plain, graphed = (Decoder(model, batch=3, max_length=90, graph=graph) for graph in (False, True))
    pools: list[object] = []
    monkeypatch.setattr("torch.cuda.CUDAGraph", lambda: Captured(graphed))
    monkeypatch.setattr("torch.cuda.graph", lambda graph, pool: (pools.append(pool), graph.capture())[1])
    monkeypatch.setattr("torch.cuda.graph_pool_handle", object)
    monkeypatch.setattr(graphed, "_capture", lambda: None)
    for length in (PROMPT, 30, 29, 32, 25):  # all in a room of 32
        for mask in (None, padded(3, length)[1]):
            ids = tokens(3, length, seed=length)
            torch.testing.assert_close(graphed.prefill(ids, mask), plain.prefill(ids, mask))
            for _ in range(2):
                fed = plain.token[:, 0].clone()
                torch.testing.assert_close(graphed.feed(fed), plain.feed(fed))
    rows = min(3, pass_tokens // 32)
    firsts = range(0, 3, rows)
    assert set(graphed._prompts) == {(32, padded, first) for padded in (False, True) for first in firsts}
    assert [len(known.ids) for known in graphed._prompts.values()] == 2 * [min(rows, 3 - at) for at in firsts]
    assert all(known.graph.replays == 4 for known in graphed._prompts.values())
    assert len(pools) == len(graphed._prompts) and len(set(pools)) == 1


def test_a_capture_that_fails_leaves_prompts_to_be_read_without(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixed_model()
    plain, graphed = (Decoder(model, batch=2, max_length=64, graph=graph) for graph in (False, True))

    def fail(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("torch.cuda.CUDAGraph", lambda: None)
    monkeypatch.setattr("torch.cuda.graph", fail)
    monkeypatch.setattr("torch.cuda.graph_pool_handle", object)
    for _ in range(3):
        ids = tokens(2, PROMPT)
        torch.testing.assert_close(graphed.prefill(ids), plain.prefill(ids))
    assert not graphed.graphs_prompts and not graphed._prompts and graphed._pool is None


def test_a_first_reading_that_is_interrupted_is_no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(mixed_model(), batch=2, max_length=64, graph=True)
    monkeypatch.setattr(decoder, "_capture_prompts", lambda *_: pytest.fail("kernels are not compiled yet"))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(decoder, "_run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        decoder.prefill(tokens(2, PROMPT))
    decoder.prefill(tokens(2, PROMPT))


@pytest.mark.parametrize("kv_dtype", [None, "fp8"])
@pytest.mark.parametrize(
    ("line", "settings", "pass_tokens"),
    [
        (None, {}, 1000),
        ("F S0 R0 W F S4 F", {}, 70),
        ("F S0 R0 W F S4 W", {"gate": "sigmoid", "maps": True, "sinks": True}, 1000),
        ("W F S1 R1 S1 F S5", {"block_size": 1, "topk": 5, "window": 2}, 160),
        ("F S0*6", {"window": 40}, 1000),
    ],
    ids=str,
)
def test_prompts_filled_up_to_a_graphs_room_are_read_as_they_are(
    line: str | None,
    settings: dict[str, Any],
    pass_tokens: int,
    kv_dtype: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hyconvert.generation.decoder.PASS_TOKENS", pass_tokens)
    model = base_model("qwen3") if line is None else mixed_model(line=line, **settings)
    options: dict[str, Any] = {"batch": 3, "max_length": 90, "kv_dtype": kv_dtype}
    plain, filled = Decoder(model, **options), FilledUp(model, **options)
    for length in (PROMPT, 16, 2, 70):  # a longer one again, so that the cache holds others' keys and values
        for mask in (None, padded(3, length)[1] if length > 20 else None):
            ids = tokens(3, length, seed=length)
            torch.testing.assert_close(filled.prefill(ids, mask), plain.prefill(ids, mask))
            for _ in range(3):
                fed = plain.token[:, 0].clone()
                torch.testing.assert_close(filled.feed(fed), plain.feed(fed))


def test_few_graphs_have_room_for_prompts_of_all_lengths() -> None:
    for length in range(1, 9000):
        room = prompt_room(length, 8192)
        assert min(length, 8192) <= room <= min(8192, max(16, length * 9 / 8 + 16))
    assert len({prompt_room(length, 8192) for length in range(1, 8193)}) < 80
    assert prompt_room(8192, 8192) == 8192


def test_only_prompts_that_launching_would_hold_up_are_read_by_graphs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = Decoder(mixed_model(), batch=2, max_length=64)
    assert not decoder.reads_by_graph(30), "there is no GPU"
    decoder.graphs_prompts = True
    assert decoder.reads_by_graph(30)
    decoder.select = lambda indices, at: indices
    assert not decoder.reads_by_graph(30)
    decoder.select = None
    monkeypatch.setattr("hyconvert.generation.decoder.GRAPH_PRODUCTS", 1000)
    assert not decoder.reads_by_graph(30)
    blocks = decoder.network.blocks
    weights = sum(
        weight.numel() for block in blocks
        for weight in (block.inputs.weight, block.output.weight, *block.mlp.weights())
    )  # fmt: skip
    monkeypatch.setattr("hyconvert.generation.decoder.GRAPH_PRODUCTS", 32 * weights / len(blocks))
    assert not decoder.reads_by_graph(30), "two rows with room for 32 tokens each pass at once"
    monkeypatch.setattr("hyconvert.generation.decoder.PASS_TOKENS", 63)
    assert decoder.reads_by_graph(30), "they pass one after the other"
    monkeypatch.undo()
    monkeypatch.setattr("hyconvert.generation.decoder.PASS_TOKENS", 31)
    assert not decoder.reads_by_graph(30), "the room of its graph does not pass at once"
    monkeypatch.undo()
    experts = Decoder(mixed_model("qwen3_moe"), batch=1, max_length=64)
    experts.graphs_prompts = True
    assert not experts.reads_by_graph(30)


def test_kernels_are_those_of_free_launches_where_prompts_are_read_by_graphs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, free = Decoder._run, []

    def noted(decoder: Decoder, *arguments: Any) -> Tensor:
        free.append(takes_over_from(8, 1 / 8) == 1)
        return run(decoder, *arguments)

    monkeypatch.setattr(Decoder, "_run", noted)
    decoder = FilledUp(mixed_model(), batch=1, max_length=64)
    decoder.prefill(tokens(1, 20))
    decoder.step()
    decoder.graphs_prompts = False
    decoder.prefill(tokens(1, 20))
    assert free == [True, False, False]


def test_rows_that_are_read_one_after_the_other_write_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyconvert.generation.decoder.PASS_TOKENS", PROMPT)
    check(mixed_model())


def test_long_prompts_pass_the_mlp_in_pieces() -> None:
    model, ids = mixed_model(), tokens(2, PROMPT)
    decoder = Decoder(model, batch=2, max_length=64)
    for block in decoder.network.blocks:
        block.mlp.tokens = 10
    assert torch.equal(decoder.generate(ids, max_new_tokens=NEW), model.generate(ids, **GREEDY))


@pytest.mark.parametrize(("width", "most"), [(1536, 32_768), (12_288, 4096), (14_336, 4096)])
def test_the_narrower_an_mlp_the_more_tokens_it_takes(width: int, most: int) -> None:
    up, down = torch.nn.Linear(1, width, bias=False), torch.nn.Linear(width, 1, bias=False)
    mlp = FusedMlp(SimpleNamespace(gate_proj=up, up_proj=up, down_proj=down), None)
    assert mlp.tokens == most


def test_gates_of_large_projections_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyconvert.generation.attention.VIEWED", 0)
    check(mixed_model())


def test_prompts_are_tried_in_as_many_rows_as_pass_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyconvert.generation.decoder.PASS_TOKENS", 2 * PROMPT + 1)
    model = mixed_model()
    decoder, zeros = Decoder(model, batch=3, max_length=64), Decoder(model, batch=2, max_length=64)
    decoder.prefill(tokens(3, PROMPT))
    last = [cache[2:].clone() for cache in decoder.caches.keys]
    decoder.try_prompts(PROMPT)
    zeros.prefill(torch.zeros(2, PROMPT, dtype=torch.int64))
    for cache, tried, other in zip(decoder.caches.keys, zeros.caches.keys, last, strict=True):
        torch.testing.assert_close(cache[:2], tried)
        assert torch.equal(cache[2:], other)
    with pytest.raises(HyconvertError, match="do not fit into 64"):
        decoder.try_prompts(65)


@pytest.mark.parametrize("width", [3072, 3584, 4096, 5120, 8192])
def test_pieces_of_long_prompts_are_worth_a_kernel_of_their_own(width: int) -> None:
    heads = width // 128
    most = PASS_ELEMENTS // width
    for length in (most + 1, 4 * most - 3, 16 * most):
        piece = -(-length // -(-length // most))
        assert piece * heads >= HOPPER_ROWS


def test_products_may_be_of_more_rows_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyconvert.generation.network.library_rows", lambda rows, device: rows + 5)
    check(mixed_model())


def test_writing_stops_where_every_row_has_ended() -> None:
    model = mixed_model()
    ids, mask = padded()
    free = model.generate(ids, attention_mask=mask, **GREEDY)[:, PROMPT:]
    for ends in ([int(free[0, 3])], [int(free[0, 2]), int(free[1, 5]), int(free[2, 9])]):
        options = {"max_new_tokens": NEW, "eos_token_id": ends, "pad_token_id": 0}
        want = model.generate(ids, attention_mask=mask, do_sample=False, **options)
        assert torch.equal(generate(model, ids, mask, **options), want)


@pytest.mark.parametrize("static", [True, False])
def test_caches_hold_exactly_what_is_counted(static: bool) -> None:
    length = 50 if static else 5  # longer and shorter than the window
    model = mixed_model()
    caches = Decoder(model, batch=2, max_length=length).caches
    want = kv_bytes(model.config, length, dtype_bytes=4, batch=2, static=True)
    assert [k.nbytes + v.nbytes for k, v in zip(caches.keys, caches.values, strict=True)] == want
    assert caches.nbytes == sum(want)
    base = base_model("llama")
    assert Decoder(base, batch=2, max_length=length).caches.nbytes == sum(
        base_kv_bytes(base.config, length, dtype_bytes=4, batch=2, static=True)
    )


def test_weights_are_held_once() -> None:
    model = mixed_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    first, second = Decoder(model, batch=1, max_length=8), Decoder(model, batch=1, max_length=8)
    block = first.network.blocks[1]
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    fused = block.inputs.weight.untyped_storage().data_ptr()
    assert attention.k_proj.weight.untyped_storage().data_ptr() == fused
    assert attention.gate.weight.untyped_storage().data_ptr() == fused
    assert second.network.blocks[1].inputs.weight.data_ptr() == block.inputs.weight.data_ptr()
    assert mlp.up_proj.weight.untyped_storage().data_ptr() == block.mlp.up.weight.untyped_storage().data_ptr()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_sampling_follows_the_seed_and_its_limits() -> None:
    model, ids = mixed_model(), tokens(2, PROMPT)

    def sample(seed: int, **options: Any) -> Tensor:
        torch.manual_seed(seed)
        return generate(model, ids, max_new_tokens=NEW, eos_token_id=[], temperature=1.0, **options)

    assert torch.equal(sample(3), sample(3))
    assert not torch.equal(sample(3), sample(4))
    greedy = model.generate(ids, **GREEDY)
    assert torch.equal(sample(3, top_k=1), greedy)
    assert torch.equal(sample(3, top_p=1e-6), greedy)
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log().expand(4000, 4)
    for limits, allowed in (({}, 4), ({"top_k": 2}, 2), ({"top_p": 0.6}, 2), ({"top_p": 0.71}, 3)):
        torch.manual_seed(0)
        shares = torch.bincount(Sampling(1.0, **limits).choose(logits), minlength=4) / 4000
        want = torch.tensor([0.4, 0.3, 0.2, 0.1])[:allowed]
        torch.testing.assert_close(shares[:allowed], want / want.sum(), atol=0.03, rtol=0)
        assert not shares[allowed:].any()


def test_what_does_not_fit_is_refused() -> None:
    model, ids = mixed_model(), tokens(1, 10)
    decoder = Decoder(model, batch=1, max_length=12)
    with pytest.raises(HyconvertError, match="give it at least 13, or ask for fewer"):
        decoder.generate(ids, max_new_tokens=3)
    with pytest.raises(HyconvertError, match="prompts of 13 tokens for a decoder with room for 12"):
        decoder.prefill(tokens(1, 13))
    with pytest.raises(HyconvertError, match="2 prompts for a decoder with room for 1"):
        decoder.prefill(tokens(2, 4))
    with pytest.raises(HyconvertError, match="the prompts are empty"):
        decoder.prefill(ids[:, :0])
    with pytest.raises(HyconvertError, match="asks for nothing"):
        decoder.generate(ids, max_new_tokens=0)
    decoder.prefill(ids)
    decoder.step()
    decoder.step()
    with pytest.raises(HyconvertError, match="have reached 12 tokens"):
        decoder.step()
    with pytest.raises(HyconvertError, match="13 tokens do not fit into 12"):
        decoder.assume(13)
    with pytest.raises(HyconvertError, match="room for 0 sequences"):
        Decoder(model, batch=0, max_length=12)
    for wrong in (torch.ones(1, 9), torch.tensor([[1] * 8 + [0] * 2]), torch.zeros(1, 10)):
        with pytest.raises(HyconvertError, match="attention mask"):
            decoder.prefill(ids, wrong)
    for options in ({"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}):
        with pytest.raises(HyconvertError):
            Sampling(**options)


def test_models_that_the_loop_cannot_run_are_refused() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(UnsupportedModelError, match="RoPE of type 'dynamic' changes with the length"):
        Decoder(base_model("llama", rope_parameters=rope), batch=1, max_length=8)
    model = base_model("llama")
    attention = model.model.layers[2].self_attn
    attention.q_proj = torch.nn.Sequential(attention.q_proj)
    with pytest.raises(UnsupportedModelError, match=r"layers\.2\.self_attn\.q_proj is a Sequential"):
        Decoder(model, batch=1, max_length=8)


def test_random_contexts_decode() -> None:
    decoder = Decoder(mixed_model(), batch=2, max_length=40)
    decoder.assume(30)
    for _ in range(10):
        decoder.step()
    assert decoder.length == 40 and int(decoder.at) == 10 and decoder.caches.keys[0].isfinite().all()


class Recorded:
    """Stands in for a CUDA graph: a replay is a step that writes its logits over those of the capture."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.logits = torch.zeros(decoder.batch, decoder.network.embedding.shape[0])

    def replay(self) -> None:
        outside = self.decoder.logits
        self.decoder._step()
        self.logits.copy_(self.decoder.logits)
        self.decoder.logits = outside


def test_a_fed_token_gives_its_own_logits_from_a_graph_after_a_second_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def capture(decoder: Decoder) -> None:
        decoder._graph = Recorded(decoder)  # type: ignore[assignment]
        decoder.logits = decoder._graph.logits  # type: ignore[union-attr]

    monkeypatch.setattr(Decoder, "_capture", capture)
    monkeypatch.setattr(Decoder, "reads_by_graph", lambda *_: False)
    model = mixed_model()
    plain, graphed = (
        Decoder(model, batch=1, max_length=PROMPT + NEW, graph=graph) for graph in (False, True)
    )
    for seed, length in ((0, PROMPT), (1, 9)):
        ids = tokens(1, length, seed=seed)
        for decoder in (plain, graphed):
            decoder.prefill(ids)
        for at in range(3):
            fed = tokens(1, 1, seed=at)[0]
            assert torch.equal(graphed.feed(fed), plain.feed(fed)), (length, at)


def test_fused_inputs_are_filled_up_and_joined_once() -> None:
    model = mixed_model(line="F S0 W F*4")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    first, again = read_network(model).blocks[1].inputs, read_network(model).blocks[1].inputs
    assert first.weight.shape[0] % 8 == 0 and first.fill == again.fill > 0
    assert not first.weight[-first.fill :].any()
    assert first.weight.data_ptr() == again.weight.data_ptr()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
