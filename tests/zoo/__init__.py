"""The named models on which conjoin is tested, one file for each package or field.

The packages are imported when a model is built, so that listing the names needs none of them.
"""

from zoo import (
    attention,
    compact,
    control,
    densities,
    diffusion,
    language,
    matching,
    medical,
    ours,
    recommenders,
    science,
    sequences,
    tabular,
    vision,
)
from zoo.specimen import Specimen

FILES = (
    ours,
    vision,
    language,
    diffusion,
    attention,
    compact,
    control,
    densities,
    matching,
    medical,
    recommenders,
    science,
    sequences,
    tabular,
)

ZOO: dict[str, Specimen] = {name: model for file in FILES for name, model in file.MODELS.items()}
"""All models by name; no name stands for two."""
