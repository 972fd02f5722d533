"""Models whose branches go on for several layers, written in the idiom of public code.

Each says how many operations it runs, and how many would do: counted by hand, from what the model
computes. `tests/test_depth.py` has the tests.
"""

from depth import attention, control, recommenders, vision
from depth.model import Deep

MODELS: dict[str, Deep] = {
    name: model
    for file in (vision, recommenders, control, attention)
    for name, model in file.MODELS.items()
}
"""All models by name."""
