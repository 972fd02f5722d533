"""The named models on which conjoin is tested, one file for each package they come from.

The packages are imported when a model is built, so that listing the names needs none of them.
"""

from zoo import diffusion, language, ours, vision
from zoo.specimen import Specimen

PACKAGES = {
    "torch": ours.MODELS,
    "pytorchcv": vision.MODELS,
    "transformers": language.MODELS,
    "diffusers": diffusion.MODELS,
}
"""The models by name, by the package that they need."""

ZOO: dict[str, Specimen] = {
    name: specimen for models in PACKAGES.values() for name, specimen in models.items()
}
"""All models by name."""

PACKAGE: dict[str, str] = {name: package for package, models in PACKAGES.items() for name in models}
"""The package that a model needs, by the model's name."""
