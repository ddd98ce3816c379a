"""The configs and recipes that come with the project, wherever it is.

In a checkout they lie beside the package, where it is installed inside it (pyproject.toml says so).
A folder beside an installed package would be somebody else's: the one inside is looked for first.
"""

from pathlib import Path

from lctw_megatron.config.validation_errors import nearest
from lctw_megatron.errors import InputError

_PACKAGE = Path(__file__).parents[1]

PROJECT = None if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent
"""The checkout, with its tools/; None where the package is installed without one."""

CONFIGS = (PROJECT or _PACKAGE) / "configs"
RECIPES = (PROJECT or _PACKAGE) / "recipes"


def find_recipe(name: str | Path) -> Path:
    """The file ``name``; where there is none, the shipped recipe that is called so: `quickstart`
    is quickstart/recipe.yaml, any other file of that folder is `quickstart/NAME`.

    Raises InputError if it is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    files = RECIPES.glob("*/*.yaml")
    shipped = {f"{f.parent.name}/{f.stem}".removesuffix("/recipe"): f for f in files}
    if str(name) in shipped:
        return shipped[str(name)]
    raise InputError(
        f"{path}: no such file, and no recipe of {RECIPES}; {nearest(str(name), shipped)}"
    )
