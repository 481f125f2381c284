"""The gate: how far a converted model may be from its base."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hyconvert.errors import RecipeError
from hyconvert.plan import explain
from hyconvert.yaml_files import read_yaml


class Limits(BaseModel):
    """Bounds of a converted model's distance from its base; None checks nothing. Also the section `gate` of a recipe.

    The defaults are what a model should keep to that stands in for its base; conversion without healing often does not.

    Attributes:
        perplexity_ratio: most perplexity over the base's.
        kl: most KL(base || converted) per token, nats.
        agreement: least share of positions with the same most likely token.
        needle_drop: most loss of exact answers to needle questions of all kinds, as a share of all questions.
        copy_nll_rise: most rise of a copied token's NLL, nats.
        own_text_rise: most rise of the base's NLL per token from its own greedy text to the converted model's, nats.
        repeated_rise: most rise of the share of repeated 4-grams in greedy text.
        kv_share: most KV bytes per token, as a share of the base's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    perplexity_ratio: float | None = Field(default=1.10, gt=0)
    kl: float | None = Field(default=0.20, ge=0)
    agreement: float | None = Field(default=0.80, ge=0, le=1)
    needle_drop: float | None = Field(default=0.10, ge=0, le=1)
    copy_nll_rise: float | None = Field(default=0.20, ge=0)
    own_text_rise: float | None = Field(default=0.50, ge=0)
    repeated_rise: float | None = Field(default=0.20, ge=0)
    kv_share: float | None = Field(default=None, gt=0, le=1)

    @classmethod
    def load(cls, path: str | Path) -> Limits:
        """Limits of a YAML or JSON file: the section `gate` of a recipe, or the limits themselves.

        Raises:
            RecipeError: the file cannot be read, is no such file, or holds no valid limits.
        """
        data = read_yaml(path, f"file of limits {path}")
        if not isinstance(data, dict):
            raise RecipeError(f"{path} holds no limits; write some, such as perplexity_ratio: 1.05")
        if "gate" in data:
            data = data["gate"]
        elif "heal" in data or "convert" in data:
            raise RecipeError(f"recipe {path} has no section 'gate'; add one, or leave out --limits")
        try:
            return cls.model_validate(data or {})
        except ValidationError as error:
            raise RecipeError(f"limits in {path}: {explain(error, cls)}") from error
