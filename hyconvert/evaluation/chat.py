"""Talking to a converted model in the terminal, with the weight of its KV cache in sight."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from hyconvert.evaluate import human_bytes, pick_device
from hyconvert.evaluation.generation import end_tokens
from hyconvert.evaluation.models import load_pair
from hyconvert.evaluation.speed import cache_bytes
from hyconvert.inspection import read_config
from hyconvert.loading import load, quiet_loading

HELP = "Type and press Enter; /new begins anew, /quit or Ctrl-D ends."


class Speaker:
    """One model in a conversation, with the cache of all that was said.

    Args:
        model: the model.
        tokenizer: its tokenizer; without a chat template the conversation is plain text.
        max_new_tokens: longest answer.
        temperature: 0 is greedy.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_new_tokens: int, temperature: float) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.ends = end_tokens(model, tokenizer)
        self.messages: list[dict[str, str]] = []
        self.forget()

    def forget(self) -> None:
        """Begin anew, with nothing cached."""
        self.cache: Any = None
        self.cached: list[int] = []

    @torch.no_grad()
    def answer(self, write: Callable[[str], None]) -> str:
        """Answer the messages so far, writing pieces of text as they come; the answer joins the messages."""
        tokens = self._tokens()
        if self.cached != tokens[: len(self.cached)] or len(self.cached) >= len(tokens):
            self.forget()  # the template has rewritten what was said before
        device = self.model.device
        new: Any = torch.tensor([tokens[len(self.cached) :]], device=device)
        answer: list[int] = []
        shown = ""
        while len(answer) < self.max_new_tokens:
            out = self.model(new, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.cache = out.past_key_values
            self.cached += new[0].tolist()
            token = self._pick(out.logits[0, -1])
            if token in self.ends:
                break
            answer.append(token)
            text = self.tokenizer.decode(answer, skip_special_tokens=True)
            if not text.endswith("\ufffd"):  # half a character
                write(text[len(shown) :])
                shown = text
            new = torch.tensor([[token]], device=device)
        text = str(self.tokenizer.decode(answer, skip_special_tokens=True))
        write(text[len(shown) :])
        self.messages.append({"role": "assistant", "content": text})
        return text

    @property
    def held(self) -> tuple[int, int]:
        """Tokens read so far, and the bytes of the KV cache."""
        return len(self.cached), cache_bytes(self.cache) if self.cache is not None else 0

    def _tokens(self) -> list[int]:
        if self.tokenizer.chat_template:
            found = self.tokenizer.apply_chat_template(
                self.messages, add_generation_prompt=True, return_dict=True
            )
            return list(found["input_ids"])
        text = "\n".join(message["content"] for message in self.messages) + "\n"
        return list(self.tokenizer(text)["input_ids"])

    def _pick(self, logits: Any) -> int:
        if self.temperature == 0:
            return int(logits.argmax())
        return int(torch.multinomial((logits.float() / self.temperature).softmax(-1), 1))


def chat(
    path: str,
    *,
    base: str | bool = False,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    read: Callable[[str], str] = input,
) -> None:
    """Hold a conversation until the input ends.

    Args:
        path: the converted checkpoint.
        base: let the base answer too: True for the recorded one, or where it is.
        system: system prompt.
        max_new_tokens, temperature, seed: of the answers.
        device, dtype: of the models.
        read: gives what the user types after a prompt; EOFError ends.

    Raises:
        HyconvertError: a checkpoint cannot be used.
    """
    from transformers import AutoTokenizer

    torch.manual_seed(seed)
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    speakers: dict[str, Speaker] = {}
    if base:
        pair = load_pair(path, base=None if base is True else str(base), device=device, dtype=dtype)
        speakers = {name: Speaker(model, pair.tokenizer, **options) for name, model in pair.models.items()}  # type: ignore[arg-type]
    else:
        read_config(path)
        with quiet_loading():
            model = load(path, **({} if dtype == "auto" else {"dtype": dtype}))
        tokenizer = AutoTokenizer.from_pretrained(path)
        speakers["converted"] = Speaker(model.to(pick_device(device)), tokenizer, **options)  # type: ignore[arg-type]
    print(HELP, file=sys.stderr)
    _start(speakers, system)
    while True:
        try:
            said = read("> ").strip()
        except EOFError:
            break
        if said == "/quit":
            break
        if said == "/new":
            _start(speakers, system)
        elif said:
            for name, speaker in speakers.items():
                speaker.messages.append({"role": "user", "content": said})
                if len(speakers) > 1:
                    print(f"{name}: ", end="")
                speaker.answer(lambda piece: print(piece, end="", flush=True))
                tokens, held = speaker.held
                print()
                print(f"[{name}: {tokens:,} tokens, {human_bytes(held)} of KV]", file=sys.stderr)


def _start(speakers: dict[str, Speaker], system: str | None) -> None:
    for speaker in speakers.values():
        speaker.forget()
        speaker.messages[:] = [{"role": "system", "content": system}] if system else []
