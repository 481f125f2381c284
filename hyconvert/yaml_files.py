"""Reading the YAML files that people write: recipes and limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hyconvert.errors import RecipeError


def read_yaml(path: str | Path, what: str) -> Any:
    """The data of a YAML or JSON file; `what` it is goes into the error.

    Raises:
        RecipeError: the file cannot be read, or is no YAML.
    """
    import yaml

    try:
        return yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise RecipeError(f"{what} cannot be read ({error.strerror}); check the name") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{what} is not valid YAML ({' '.join(str(error).split())})") from error
