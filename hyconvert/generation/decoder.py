"""The decode loop: preallocated caches, prompts layer by layer, and one CUDA graph per step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyconvert.errors import HyconvertError
from hyconvert.generation.attention import DenseWay, Pass, attend
from hyconvert.generation.caches import Caches
from hyconvert.generation.network import FusedMlp, Network, Norm, read_network
from hyconvert.generation.sampling import Sampling
from hyconvert_kernels import add_norm
from hyconvert_kernels.configs import launches_free

PASS_TOKENS = 32_768
"""Most tokens of prompts that pass through the layers at a time."""
PASS_ELEMENTS = 1 << 25
"""Most numbers in such a pass's hidden states, of which a layer needs a dozen times as much: 8,192 tokens of 4,096."""
GRAPH_PRODUCTS = 2 * 10**11
"""Prompts are read by CUDA graphs up to so many multiplications of a pass in the weights of one layer. They take an
H100 some 0.6 ms, and launching a layer's kernels one by one takes a millisecond or more on a busy host."""
GRAPHED_PASSES = 8
"""Most passes of prompts that are read by graphs: each has its own, which takes time to capture and memory."""


class Decoder:
    """A model with room for so many sequences of such a length, ready to write.

    Dense models of a supported family and converted models run on the same loop. On a GPU a step, from the embedding
    to the next token, is one CUDA graph; elsewhere it runs on the plain references.

    Args:
        model: from `hyconvert.load`, or a base from transformers. Its projections become views of fused ones; it can
            still be used as before.
        batch: sequences.
        max_length: most tokens of a sequence, prompt, padding and new ones together.
        sampling: how tokens are chosen.
        eos: token ids that end a sequence.
        pad: what follows the end.
        kv_dtype: "fp8" keeps the long caches (full and reuse layers) in float8_e4m3fn, with a scale per token and KV
            head; None is the model's dtype.
        graph: capture steps, and prompts that are short for the model, in CUDA graphs; None means where there is a GPU.
        implementation: "triton", "reference", or None for whichever runs on the model's device.

    Raises:
        UnsupportedModelError: the model does not fit; see `read_network`.
        HyconvertError: room for nothing was asked for, or for FP8 that the GPU cannot read.
    """

    def __init__(
        self,
        model: Any,
        *,
        batch: int,
        max_length: int,
        sampling: Sampling | None = None,
        eos: tuple[int, ...] = (),
        pad: int = 0,
        kv_dtype: str | None = None,
        graph: bool | None = None,
        implementation: str | None = None,
    ) -> None:
        if batch < 1 or max_length < 1:
            raise HyconvertError(
                f"room for {batch} sequences of {max_length} tokens is none; use at least 1 of each"
            )
        self.network: Network = model if isinstance(model, Network) else read_network(model, implementation)
        self.batch, self.max_length = batch, max_length
        self.sampling = sampling or Sampling()
        self.pad, self.kv_dtype = pad, kv_dtype
        self.implementation = implementation
        device = self.network.device
        self.graphed = device.type == "cuda" if graph is None else graph
        self.caches = Caches.allocate(self.network, batch, max_length, kv_dtype)
        self.cos, self.sin = self.network.rope_tables(max_length)
        self.length = 0
        """Tokens cached per row, padding counted; the host's copy of `offset`."""
        self.dense: DenseWay | None = None
        """See `Pass.dense`; call `forget_graph` after changing it."""
        self.select: Callable[[Tensor, int], Tensor] | None = None
        """See `Pass.select`."""
        self.logits: Tensor | None = None
        """[B, V] that the latest tokens were chosen from; the next step overwrites it."""
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.offset = torch.zeros(batch, dtype=torch.int64, device=device)
        self.first = torch.zeros(batch, dtype=torch.int64, device=device)
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)
        self.written = torch.zeros(batch, max_length + 1, dtype=torch.int64, device=device)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)
        self._eos = torch.tensor(eos, dtype=torch.int64, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._graph_logits: Tensor | None = None
        self.graphs_prompts = self.graphed
        """Whether short prompts are read by CUDA graphs; not worth it for prompts of one call alone."""
        self._prompts: dict[tuple[int, bool, int], GraphedPrompts] = {}
        self._pool: Any = None

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Read prompts, forget all earlier ones, and choose each row's first new token.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T] with 0 for padding, which must be on the left; None for none.

        Returns:
            Logits [B, V] after the prompts.

        Raises:
            HyconvertError: the prompts do not fit, or are not padded on the left.
        """
        batch, length = input_ids.shape
        if batch != self.batch:
            raise HyconvertError(
                f"{batch} prompts for a decoder with room for {self.batch}; make one for {batch}"
            )
        if length > self.max_length or not length:
            raise HyconvertError(
                f"prompts of {length} tokens for a decoder with room for {self.max_length}; make one with a larger "
                "max_length"
                if length
                else "the prompts are empty; begin with at least one token"
            )
        device = self.network.device
        padding = _padding(attention_mask, input_ids)
        padded = bool(padding.any())
        self.first.copy_(padding)
        self.length = length
        self.offset.fill_(length)
        self.at.zero_()
        self.finished.zero_()
        ids = input_ids.to(device)
        graphed = self.reads_by_graph(length)
        read = self._read_graphed if graphed else self._read
        rows = max(1, self.pass_tokens // (prompt_room(length, self.max_length) if graphed else length))
        logits = torch.cat(
            [read(ids[at : at + rows], slice(at, at + rows), padded) for at in range(0, batch, rows)]
        )
        self.logits = logits
        self._emit(self.sampling.choose(logits))
        return logits

    @torch.inference_mode()
    def try_prompts(self, length: int) -> None:
        """Read prompts of `length` zeros into as many rows as pass through the layers at a time, to see that there is
        memory for them; what those rows held is lost.

        Raises:
            HyconvertError: there is no room for so many tokens.
        """
        self._check_room(length)
        rows = min(self.batch, max(1, self.pass_tokens // length))
        ids = torch.zeros(rows, length, dtype=torch.int64, device=self.network.device)
        self._read(ids, slice(0, rows), False)

    def _check_room(self, length: int) -> None:
        if length > self.max_length:
            raise HyconvertError(
                f"{length} tokens do not fit into {self.max_length}; use a larger max_length"
            )

    @property
    def pass_tokens(self) -> int:
        """Tokens of prompts that pass through the layers at a time: several rows, or a piece of a long one."""
        return max(1, min(PASS_TOKENS, PASS_ELEMENTS // self.network.embedding.shape[1]))

    def reads_by_graph(self, length: int) -> bool:
        """Whether prompts of `length` tokens are read by CUDA graphs, in passes that launching would hold up."""
        blocks = self.network.blocks
        room = prompt_room(length, self.max_length)
        rows = min(self.batch, self.pass_tokens // room)
        if not self.graphs_prompts or self.select is not None or length < 2 or not rows:
            return False
        if self.batch > GRAPHED_PASSES * rows:
            return False
        if not all(isinstance(block.mlp, FusedMlp) for block in blocks):
            return False  # what transformers does with experts may wait for the GPU
        weights = sum(
            weight.numel() for block in blocks
            for weight in (block.inputs.weight, block.output.weight, *block.mlp.weights())
        )  # fmt: skip
        return rows * room * weights <= GRAPH_PRODUCTS * len(blocks)

    def assume(self, length: int, seed: int = 0) -> None:
        """Fill the caches with random numbers as if prompts of `length` tokens had been read, to time what follows.

        Raises:
            HyconvertError: there is no room for so many.
        """
        self._check_room(length)
        self.caches.fill(seed)
        self.first.zero_()
        self.offset.fill_(length)
        self.length = length
        self.at.zero_()
        self.finished.zero_()
        self.token.fill_(1)

    @torch.inference_mode()
    def step(self) -> None:
        """Write one more token per row, into `token` and `written`.

        Raises:
            HyconvertError: the sequences have their maximum length.
        """
        if self.length >= self.max_length:
            raise HyconvertError(
                f"the sequences have reached {self.max_length} tokens, all that there is room for; make a decoder with "
                "a larger max_length"
            )
        if self.graphed and self._graph is None:
            self._capture()
            self._graph_logits = self.logits
        if self._graph is not None:
            self._graph.replay()
            self.logits = self._graph_logits  # a prompt read since the capture has left its own there
        else:
            self._step()
        self.length += 1

    def feed(self, token: Tensor) -> Tensor:
        """Put tokens [B] in the place of those chosen last, and take a step.

        Returns:
            Logits [B, V] after them, which the next step overwrites.

        Raises:
            HyconvertError: see `step`.
        """
        self.token.copy_(token[:, None])
        self.step()
        assert self.logits is not None
        return self.logits

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, max_new_tokens: int
    ) -> Tensor:
        """Continue prompts.

        Args:
            input_ids, attention_mask: as for `prefill`.
            max_new_tokens: most new tokens per row.

        Returns:
            [B, T + N] prompts and new tokens on the model's device, as `transformers`' generate returns them: N is
            less than asked for where every row has ended, and rows that end earlier are filled up with `pad`.

        Raises:
            HyconvertError: see `prefill`; or there is no room for so many.
        """
        length = input_ids.shape[1]
        if length + max_new_tokens > self.max_length:
            raise HyconvertError(
                f"{length} tokens and {max_new_tokens} new ones are more than max_length {self.max_length}; give it at "
                f"least {length + max_new_tokens}, or ask for fewer new tokens"
            )
        if max_new_tokens < 1:
            raise HyconvertError(f"max_new_tokens {max_new_tokens} asks for nothing; use at least 1")
        self.prefill(input_ids, attention_mask)
        for count in range(1, max_new_tokens):
            if (
                len(self._eos) and count % 8 == 1 and bool(self.finished.all())
            ):  # seldom: it waits for the GPU
                break
            self.step()
        count = int(self.at)
        new = self.written[:, :count].clone()
        if len(self._eos):
            ended = torch.isin(new, self._eos).long().cumsum(1) > 0
            open_until = (~ended).sum(1).max()  # tokens before the last row's end
            new = new[:, : min(count, int(open_until) + 1)]
        return torch.cat([input_ids.to(new.device), new], 1)

    def _read(self, ids: Tensor, rows: slice, padded: bool) -> Tensor:
        """Logits [b, V] after some rows' prompts, which go into the caches.

        Long ones pass in pieces. A dense model takes a prompt as a whole, by PyTorch's attention, and so do caches in
        FP8: a piece would find the earlier ones rounded.
        """
        length = ids.shape[1]
        whole = self.kv_dtype is not None or not any(block.scored for block in self.network.blocks)
        count = 1 if whole else -(-length // self.pass_tokens)
        size = -(-length // count)
        for at in range(0, length, size):
            piece = ids[:, at : at + size]
            last = torch.full((1,), piece.shape[1] - 1, dtype=torch.int64, device=ids.device)
            logits = self._read_piece(piece, last, rows, padded, at, at + size >= length)
        return logits

    def _read_piece(
        self, ids: Tensor, last: Tensor, rows: slice, padded: bool, at: int = 0, ends: bool = True
    ) -> Tensor:
        """Logits [b, V] after the token `last` [1] of ids [b, T], whose slots begin at `at`; see `_run`."""
        first = self.first[rows]
        slots = torch.arange(at, at + ids.shape[1], device=ids.device)
        now = Pass(
            torch.full_like(first, at), first, torch.minimum(first[:, None], slots).contiguous(), self.cos, self.sin,
            padded, at, ends, last, implementation=self.implementation, select=self.select,
        )  # fmt: skip
        return self._run(ids, rows, now)

    def _read_graphed(self, ids: Tensor, rows: slice, padded: bool) -> Tensor:
        """Logits [b, V] after some rows' prompts, by the graph for prompts of about their length in these rows.

        The first such prompts are read without one, and the second capture it.
        """
        length = ids.shape[1]
        room = prompt_room(length, self.max_length)
        known = self._prompts.get((room, padded, rows.start))
        if known is None:
            known = GraphedPrompts(ids.new_zeros(len(ids), room), ids.new_zeros(1))
            self._prompts[room, padded, rows.start] = known
        known.ids[:, :length] = ids
        known.last.fill_(length - 1)
        if (
            known.graph is None
            and known.logits is not None
            and not self._capture_prompts(known, rows, padded)
        ):
            return self._read_filled(known.ids, known.last, rows, padded)
        if known.graph is None:
            logits = self._read_filled(known.ids, known.last, rows, padded)
            known.logits = logits.clone()
            return logits
        known.graph.replay()
        assert known.logits is not None
        return known.logits.clone()

    def _capture_prompts(self, known: GraphedPrompts, rows: slice, padded: bool) -> bool:
        """Record how prompts are read; if that fails, as for lack of memory, none are read by graphs any more."""
        assert known.logits is not None
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                known.logits.copy_(self._read_filled(known.ids, known.last, rows, padded))
        except RuntimeError:
            self.graphs_prompts, self._pool = False, None
            self._prompts.clear()
            return False
        known.graph = graph
        return True

    def _read_filled(self, ids: Tensor, last: Tensor, rows: slice, padded: bool) -> Tensor:
        """Logits [b, V] after some rows' prompts, which end with the token `last` [1] of ids [b, T].

        What is behind it fills up: no earlier token attends to it, and decoding overwrites it. With `last` on the GPU
        this is the same work for all prompts of up to T tokens.
        """
        with launches_free():
            return self._read_piece(ids, last, rows, padded)

    def _run(self, ids: Tensor, rows: slice, now: Pass) -> Tensor:
        """Logits [b, V] of the last of ids [b, T]; of a pass that does not end its prompts nothing, [b, 0]."""
        network = self.network
        x = torch.nn.functional.embedding(ids, network.embedding)
        residual: Tensor | None = None
        last = len(network.blocks) - 1
        last_reader = {block.source: index for index, block in enumerate(network.blocks)}
        for index, block in enumerate(network.blocks):
            if block.before is not None:
                x, residual = self._norm(x, residual, block.before)
            elif residual is None:
                residual = x.clone()
            out = attend(network, index, x, self.caches.of(index, rows), now, last_only=index == last)
            if block.source is not None and last_reader[block.source] == index:
                del now.selected[block.source]
            if index == last and not now.ends:
                return out.new_empty(len(ids), 0)
            if index == last:  # nothing but the last token is wanted from here on
                out, residual = now.at_end(out, 1), now.at_end(residual, 1)
            x, residual = self._norm(out, residual, block.between)
            del out  # of a long prompt as large as x
            x = block.mlp(x)
            if block.behind is not None:
                x, residual = self._norm(x, residual, block.behind)
        x = self._norm(x, None if network.blocks[-1].behind is not None else residual, network.norm)[0]
        return network.head(x[:, -1])

    def _norm(self, x: Tensor, residual: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
        return add_norm(
            x, residual, norm.weight, norm.eps, after=norm.after, implementation=self.implementation
        )

    def _step(self) -> None:
        now = Pass(
            self.offset, self.first, self.first[:, None], self.cos, self.sin,
            implementation=self.implementation, dense=self.dense,
        )  # fmt: skip
        logits = self._run(self.token, slice(None), now)
        self.logits = logits
        self.offset += 1
        self._emit(self.sampling.choose(logits))

    def _emit(self, token: Tensor) -> None:
        """Note each row's next token [B]."""
        if len(self._eos):
            token = torch.where(self.finished, self.pad, token)
            self.finished |= (token[:, None] == self._eos).any(1)
        self.token.copy_(token[:, None])
        self.written.scatter_(1, self.at.expand(self.batch)[:, None], token[:, None])
        self.at += 1

    def _capture(self) -> None:
        """Record a step; kernels are compiled and set up before, by two steps that leave no trace."""
        state = [self.token, self.offset, self.finished, self.at]
        kept = [x.clone() for x in state]
        seed = torch.cuda.get_rng_state(self.network.device)
        stream = _warm_up_stream(self.network.device)
        stream.wait_stream(torch.cuda.current_stream(self.network.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step()
                for x, old in zip(state, kept, strict=True):
                    x.copy_(old)
        torch.cuda.current_stream(self.network.device).wait_stream(stream)
        torch.cuda.set_rng_state(seed, self.network.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self._graph = graph

    def forget_graph(self) -> None:
        """Capture anew at the next step, after `dense` was changed."""
        self._graph = None


@dataclass
class GraphedPrompts:
    """A graph that reads prompts of up to T tokens into b rows.

    Attributes:
        ids: [b, T] int64, its input.
        last: [1] int64, its input: index of the prompts' last token.
        logits: [b, V], its output, which its next prompts overwrite; None until such prompts have been read once, so
            that their kernels are compiled.
        graph: once it is captured.
    """

    ids: Tensor
    last: Tensor
    logits: Tensor | None = None
    graph: torch.cuda.CUDAGraph | None = None


def prompt_room(length: int, most: int) -> int:
    """Tokens of the graph that reads prompts of `length`.

    At most an eighth to spare, or 15 tokens of short ones: some sixty sizes serve all lengths up to 8k.
    """
    step = 1 << max(4, length.bit_length() - 4)
    return min(most, -(-length // step) * step)


@functools.cache
def _warm_up_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all decoders: cuBLAS keeps tens of megabytes for good for every stream that it ever ran on."""
    return torch.cuda.Stream(device)


def _padding(mask: Tensor | None, ids: Tensor) -> Tensor:
    """Padding tokens [B] on the left of each row."""
    if mask is None:
        return torch.zeros(len(ids), dtype=torch.int64)
    if mask.shape != ids.shape:
        raise HyconvertError(
            f"the attention mask has shape {tuple(mask.shape)} for prompts of shape {tuple(ids.shape)}; give one entry "
            "per token"
        )
    real = mask.bool().cpu()
    if bool((real[:, 1:] < real[:, :-1]).any()) or not bool(real[:, -1].all()):
        raise HyconvertError(
            "the attention mask has padding behind or between real tokens; pad prompts on the left, and give each at "
            "least one token"
        )
    return (~real).sum(1)
