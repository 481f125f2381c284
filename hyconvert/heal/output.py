"""Writing a healed checkpoint: what was trained anew, everything else byte for byte."""

from __future__ import annotations

from typing import Any

import torch

from hyconvert.checkpoint import CheckpointWriter
from hyconvert.evaluation.card import without_evaluation
from hyconvert.heal.checks import Checked
from hyconvert.heal.report import HealReport, healed_card, plot


def write_weights(
    writer: CheckpointWriter, checked: Checked, changed: dict[str, torch.Tensor], student: Any
) -> None:
    """The checkpoint's tensors shard by shard: what was trained in its stored dtype, the rest byte for byte."""
    source = checked.converted
    if not changed.keys() <= set(source.tensor_names):  # fused experts are stored one by one
        from transformers.core_model_loading import revert_weight_conversion

        changed = dict(revert_weight_conversion(student, changed))
    if missing := changed.keys() - set(source.tensor_names):
        raise RuntimeError(f"trained tensors have no place in the checkpoint: {sorted(missing)}")
    if checked.config.tie_word_embeddings and "model.embed_tokens.weight" in changed:
        changed = changed | {"lm_head.weight": changed["model.embed_tokens.weight"]}
    for shard in source.shards:
        writer.start_shard(shard.name)
        for name in shard.tensor_names:
            tensor = changed[name].to(source.tensors[name].dtype) if name in changed else source.read(name)
            writer.add_tensor(name, tensor)


def write_companions(
    writer: CheckpointWriter, checked: Checked, report: HealReport, command: str | None
) -> None:
    """Config, tokenizer, history, `heal.json`, the plot and the model card."""
    folder = checked.converted.path
    checked.config.save_pretrained(writer.folder)
    for name, data in checked.converted.auxiliary_files().items():
        writer.write_bytes(name, data)
    if (folder / "conversion.json").is_file():
        writer.copy_file(folder / "conversion.json")
    writer.write_json("heal.json", report.to_dict())
    if (image := plot(report)) is not None:
        writer.write_bytes("heal.png", image)
    card = folder / "README.md"
    writer.write_text(
        "README.md",
        healed_card(
            without_evaluation(card.read_text()) if card.is_file() else "", report, command, image is not None
        ),
    )
