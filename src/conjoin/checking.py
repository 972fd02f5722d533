"""Checks the arguments of the public functions, and says what is wrong with them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from conjoin import memory
from conjoin.policy.deciding import check_policy
from conjoin.tracing.copies import Call


def check_model(model: object) -> None:
    """Raises TypeError where `model` is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"expected a torch.nn.Module as model, not {described(model)}. Pass the model itself: "
            "an instance of its class, or an ExportedProgram."
        )


def described(value: object) -> str:
    """What was given where something else is expected."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def example_calls(inputs: object, kwargs: dict[str, Any] | None) -> list[Call]:
    """The example calls; none where neither arguments nor keyword arguments were given.

    Raises:
        TypeError: `inputs` is no tuple or list of tuples, or `kwargs` is no dict of names.
    """
    if kwargs is not None and not (isinstance(kwargs, dict) and all(map(_is_name, kwargs))):
        raise TypeError(
            "example_kwargs is a dict of the model's keyword arguments by their names, such as "
            f"{{'mask': mask}}, not {_what(kwargs)}."
        )
    if inputs is None:
        return [] if kwargs is None else [((), kwargs)]
    calls: list[Call] = []
    for call in inputs if isinstance(inputs, list) else [inputs]:
        if not isinstance(call, tuple):
            hint = "(x,)" if isinstance(call, Tensor) else "(x, y)"
            raise TypeError(
                f"example_inputs is a tuple of the model's arguments such as {hint}, or a list of "
                f"such tuples, not {type(call).__name__}."
            )
        calls.append((call, kwargs or {}))
    return calls


def _is_name(key: object) -> bool:
    return isinstance(key, str)


def _what(value: object) -> str:
    return "a dict with other keys" if isinstance(value, dict) else type(value).__name__


def check_for_program(
    *,
    example_inputs: object = None,
    example_kwargs: object = None,
    policy: object = "auto",
    memory_budget: object = None,
    inplace: bool = False,
) -> None:
    """Raises ValueError where something is given that an exported program does not take."""
    if policy not in ("auto", "always") or memory_budget is not None:
        raise ValueError(
            "the layers of an ExportedProgram are merged wherever that is exact: leave out policy "
            "and memory_budget, or optimize the model before exporting it."
        )
    if example_inputs is not None or example_kwargs is not None:
        raise ValueError(
            "an ExportedProgram has example inputs of its own: leave out example_inputs and "
            "example_kwargs."
        )
    if inplace:
        raise ValueError("an ExportedProgram is not changed in place: leave out inplace.")


def checked_budget(
    model: nn.Module, calls: list[Call], policy: object, budget: float | None
) -> int | None:
    """Checks the policy and the budget, and gives the budget in bytes."""
    check_policy(policy)
    if policy == "measure" and not calls:
        raise ValueError(
            "policy='measure' times groups on tensors like those of a call, and example_inputs "
            "were not given. Pass example_inputs, the model's arguments as a tuple."
        )
    if budget is None:
        return None
    check_model(model)
    if not calls:
        raise ValueError(
            "memory_budget was given and example_inputs were not, which tell how large the model's "
            "tensors are. Pass example_inputs, the model's arguments as a tuple."
        )
    return memory.in_bytes(budget, model)
