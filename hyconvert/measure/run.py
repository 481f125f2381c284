"""`measure`: the damage of every candidate, one layer at a time, from one walk over the base."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from hyconvert.align.fit import FitSettings
from hyconvert.align.run import RowReader
from hyconvert.align.walk import LayerVisit, LayerWalk
from hyconvert.checkpoint import Source, open_source, recorded_name
from hyconvert.conversion import dense_plan, load_base_as
from hyconvert.data import BUILTIN, check_length, read_texts, token_blocks
from hyconvert.errors import DataError, HyconvertError, PlanError
from hyconvert.evaluate import device_name, pick_device
from hyconvert.measure.candidates import fit_candidate, make_candidate, run_from
from hyconvert.measure.costs import Cost, Costs, MeasureSettings
from hyconvert.measure.yardstick import Yardstick
from hyconvert.modeling.configuration import HyConvertConfig
from hyconvert.modeling.families import base_window, family_of_base
from hyconvert.modeling.state import dense_state
from hyconvert.plan import LayerPlan
from hyconvert.progress import Progress, silent
from hyconvert.retrieval import Mixed, Prompts, make_prompts, mix_in


def measure(
    base: str | Path,
    folder: str | Path,
    *,
    settings: MeasureSettings | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    force: bool = False,
    progress: Progress = silent,
    **changes: Any,
) -> Costs:
    """Measure what converting each layer alone would cost, and keep it in a folder.

    A measurement that was interrupted goes on where it stopped, if base and settings are the same.

    Args:
        base: Hugging Face id, folder or `.gguf` file.
        folder: where the costs go.
        settings: what to measure; by default what suits the device and the base.
        device: where to compute.
        dtype: `auto` is bfloat16 on a GPU and the checkpoint's own on the CPU.
        revision: of a Hub id.
        force: start anew where the folder holds costs of another base or other settings.
        progress: told about each candidate.
        **changes: single settings that differ from the default, by name; None for no difference.

    Raises:
        HyconvertError: base or text cannot be used, or the folder holds other costs.
    """
    where = pick_device(device)
    source = open_source(base, revision=revision, dtype=measuring_dtype(dtype, where))
    family_of_base(source)
    if settings is None:
        limit = getattr(source.config, "max_position_embeddings", None)
        settings = MeasureSettings.suited(where.type, limit, **changes)
    costs = _open_costs(Path(folder), source, str(base), revision, settings, where, force)
    if costs.expected is not None and len(costs.table) >= costs.expected:
        return costs
    Measurement(source, costs, where, Path(folder)).run(progress)
    return costs


def measuring_dtype(dtype: str, device: torch.device) -> str:
    """The dtype to measure in: `auto` is bfloat16 on a GPU and the checkpoint's own elsewhere."""
    return "bfloat16" if dtype == "auto" and device.type == "cuda" else dtype


def _open_costs(
    folder: Path,
    source: Source,
    base: str,
    revision: str | None,
    settings: MeasureSettings,
    where: torch.device,
    force: bool,
) -> Costs:
    """New costs, or those of an interrupted measurement; nothing is written yet."""
    config = source.config
    sliding = tuple(i for i in range(config.num_hidden_layers) if base_window(config, i))
    fresh = Costs(
        base=recorded_name(base), fingerprint=source.fingerprint, model=config.model_type, settings=settings,
        num_layers=config.num_hidden_layers, sliding=sliding, device=device_name(where), revision=revision,
    )  # fmt: skip
    if len(sliding) == config.num_hidden_layers:
        raise PlanError(
            "every layer of this model already has a sliding window, so there is nothing to convert"
        )
    if folder.is_file() or (
        folder.is_dir() and not (folder / "costs.json").exists() and any(folder.iterdir())
    ):
        raise HyconvertError(f"{folder} exists and holds no costs; choose another folder")
    if (folder / "costs.json").exists() and not force:
        found = Costs.load(folder, unfinished=True)
        found.check_base(source.fingerprint, base)
        if found.settings != settings:
            changed = [k for k, v in settings.model_dump().items() if getattr(found.settings, k) != v]
            raise PlanError(
                f"{folder} holds costs measured with other settings ({', '.join(changed)}); choose another folder, or "
                "replace them with --force"
            )
        return found
    return fresh


def read_sequences(
    source: Source, settings: MeasureSettings, fit_tokens: int | None = None, retrieval: float | None = None
) -> tuple[Mixed, Prompts]:
    """Text to fit on, and prompts to measure on, from different parts of the calibration text.

    Args:
        source: the base.
        settings: how much text, and of which kind.
        fit_tokens: if more than the settings', text behind the prompts is fitted on too, as far as there is some. The
            prompts stay the same.
        retrieval: share of the fitted sequences with retrieval in them, instead of the settings' unless that is 0.

    Raises:
        DataError: the text is too short, or its sequences are longer than the base was trained for.
    """
    length = settings.sequence_length
    check_length(length, source.config)
    fits = max(1, settings.fit_tokens // length)
    name = f"the calibration text {settings.calibration or BUILTIN}"
    tokenizer = source.load_tokenizer()
    blocks = token_blocks(
        read_texts(settings.calibration, column=settings.column), tokenizer,
        sequences=max(fits, (fit_tokens or 0) // length) + settings.prompts, length=length, name=name,
    )  # fmt: skip
    if len(blocks) < fits + settings.prompts:
        raise DataError(
            f"{name} holds {len(blocks)} sequences of {length} tokens, and measuring takes {fits} to fit and "
            f"{settings.prompts} to measure; give more text, or lower --fit-tokens, --prompts or "
            "--sequence-length of hyconvert measure"
        )
    end = fits + settings.prompts
    prompts = make_prompts(
        blocks[fits:end], tokenizer, questions=settings.questions, decoys=settings.decoys, copies=settings.copies,
        seed=settings.seed,
    )  # fmt: skip
    fitted = torch.cat((blocks[:fits], blocks[end:]))
    share = settings.retrieval and (retrieval or settings.retrieval)
    return mix_in(fitted, tokenizer, share, settings.seed), prompts


class Measurement:
    """One run of `measure`: the base in memory, its activations at one layer, and the costs so far."""

    def __init__(self, source: Source, costs: Costs, device: torch.device, folder: Path) -> None:
        self.source, self.costs, self.device, self.folder = source, costs, device, folder
        self.settings = costs.settings
        self.fit = FitSettings(
            rows=self.settings.rows, map_rows=self.settings.map_rows, seed=self.settings.seed
        )
        self.batch = 8 if device.type == "cuda" else 1
        self.began, self.spent = time.monotonic(), costs.seconds

    def run(self, progress: Progress) -> None:
        """Measure what is missing: windows first, since they say which layers are worth trying as sources."""
        settings, costs = self.settings, self.costs
        text, self.prompts = read_sequences(self.source, settings)
        self.tokens = text.tokens
        self.folder.mkdir(parents=True, exist_ok=True)
        costs.save_rows(self.folder)  # without a row that was cut off while it was written
        costs.save_header(self.folder)
        with progress("Loading the base", total=1):
            plan = dense_plan(self.source.config, **settings.plan_settings())
            self.model: Any = load_base_as(
                HyConvertConfig.from_base(self.source.config, plan), self.source, self.device
            )
        self.yardstick = self._base_yardstick(progress)
        costs.reference = self.yardstick.reference
        layers = [i for i in range(costs.num_layers) if i not in costs.sliding]
        windows = [(i, LayerPlan(kind="window")) for i in layers]
        self._measure(windows, progress, "Measuring windows")
        readers = [(i, choice) for i in layers for choice in self._readers(i, layers)]
        costs.expected = len({(i, c.kind, c.source) for i, c in windows + readers})
        costs.save_header(self.folder)
        self._measure(readers, progress, "Measuring sources")
        costs.seconds = self.spent + time.monotonic() - self.began
        costs.save_header(self.folder)

    def _readers(self, layer: int, layers: list[int]) -> list[LayerPlan]:
        """Sparse and reuse candidates of one layer."""
        settings = self.settings
        ranked = sorted(layers, key=lambda i: -self.costs.table[i, "window", None].damage())
        allowed = set(ranked[: settings.oracles])
        return [
            LayerPlan(kind=kind, source=source)
            for kind in ("sparse", "reuse")
            if kind in settings.kinds
            for source in layers
            if source in allowed
            and source < layer
            and (settings.span is None or layer - source <= settings.span)
        ]

    def _base_yardstick(self, progress: Progress) -> Yardstick:
        tokens = self.prompts.tokens
        with progress("Running the base", total=len(tokens)) as step, torch.no_grad():
            states = []
            for row in tokens:
                state = dense_state(1, len(row), self.device)
                out = self.model.model(row[None].to(self.device), use_cache=False, hyconvert_state=state)
                states.append(out.last_hidden_state)
                step()
        return Yardstick(self.model, self.prompts, torch.cat(states), self.settings)

    def _measure(self, candidates: list[tuple[int, LayerPlan]], progress: Progress, title: str) -> None:
        missing = [(i, c) for i, c in candidates if (i, c.kind, c.source) not in self.costs.table]
        if not missing:
            return
        sources = frozenset(c.source for _, c in missing if c.source is not None)
        last = max(i for i, _ in missing)
        walk = LayerWalk(self.model, torch.cat((self.tokens, self.prompts.tokens)), sources)
        count = len(self.tokens)
        with progress(title, total=len(missing)) as step, (self.folder / "costs.jsonl").open("a") as file:
            for visit in walk:
                choices = [choice for i, choice in missing if i == visit.index]
                fitted = LayerVisit(
                    visit.index, visit.attention, visit.entering[:count], visit.inputs[:count],
                    visit.outputs[:count], visit.rope,
                )  # fmt: skip
                reader = RowReader(fitted, self.fit, keep=True)
                for choice in choices:
                    row = self._cost(visit, fitted, reader, walk, choice)
                    file.write(row.to_json() + "\n")
                    file.flush()
                    self.costs.add(row)
                    step(f"layer {row.layer} {choice}, KL {row.kl:.4f}")
                if visit.index == last:
                    break

    def _cost(
        self, visit: LayerVisit, fitted: LayerVisit, reader: RowReader, walk: LayerWalk, choice: LayerPlan
    ) -> Cost:
        count = len(self.tokens)
        oracles = walk.oracle_states[choice.source] if choice.source is not None else []
        candidate = make_candidate(self.model, visit.index, choice)
        fit = fit_candidate(candidate, fitted, oracles[:count], self.fit, reader)
        hidden = run_from(
            self.model,
            visit.index,
            candidate,
            visit.entering[count:],
            oracles[count:],
            visit.rope,
            self.batch,
        )
        reading = self.yardstick.read(hidden)
        rise = {task: nll - self.yardstick.reference[task] for task, nll in reading.nll.items()}
        return Cost(visit.index, choice.kind, choice.source, reading.kl, rise, fit.error)
