"""Converts an optimizer's state between a plain model and an optimized one.

A model's own checkpoint needs nothing: `state_dict()` has the plain names and values either way.
An optimizer keeps its state by parameter, and an optimized model has one parameter where the
plain model has several. State of a parameter's shape (momentum, second moments) is cut and joined
like the parameter; a single number (the step) is the same for all parts.

State is told apart by its place in a param group. So both functions want the parameters of a group
with wide ones in the order of the model's `parameters()`, as where groups are made by going through
it: that is where the plain model's optimizer has the parts.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils import _pytree as pytree

from conjoin.checking import check_model, described
from conjoin.layers.checks import TENSORS
from conjoin.layers.owner import lender
from conjoin.layers.part import Part
from conjoin.layers.product import Product
from conjoin.layers.view import View
from conjoin.layers.wide import Wide

_Slot = tuple[nn.Parameter, "tuple[Wide, str, int] | None"]
"""A plain model's parameter: the Parameter that holds it, and which part of a wide one it is."""

_Held = tuple[int, nn.Parameter, "tuple[Wide, str, int] | None"]
"""The same among an optimizer's parameters: the number there first."""


def separate(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """The state of an optimizer, as an optimizer of the plain model would have it.

    Args:
        optimizer: an optimizer of `model`'s parameters, or of some of them. Those of a param group
            that has wide ones must be in the order of `model.parameters()`.
        model: the optimized model.

    Returns:
        A state dict for an optimizer that was built over `conjoin.unfuse(model)`.

    Raises:
        TypeError: `optimizer` is no optimizer, or `model` is no module.
        ValueError: the optimizer has parameters that are not the model's, or wide ones in another
            order; or it keeps state that is neither of the parameter's shape nor a number, as
            Adafactor and Muon may, or of all parameters together, as LBFGS, and cannot be cut.

    Example:
        >>> import torch, conjoin
        >>> plain = conjoin.nn.Parallel(torch.nn.Linear(8, 2), torch.nn.Linear(8, 3))
        >>> model = conjoin.optimize(plain)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> sum(part.sum() for part in model(torch.randn(4, 8))).backward()
        >>> optimizer.step()
        >>> state = conjoin.checkpoints.separate(optimizer, model)
        >>> [tuple(each["exp_avg"].shape) for each in state["state"].values()]
        [(2, 8), (2,), (3, 8), (3,)]
        >>> torch.optim.Adam(conjoin.unfuse(model).parameters()).load_state_dict(state)
    """
    slots = _checked_slots(optimizer, model)
    packed = optimizer.state_dict()
    plain: dict[str, Any] = {"state": {}, "param_groups": []}
    count = 0
    for group, held in zip(packed["param_groups"], optimizer.param_groups, strict=True):
        mine = _held(slots, model, held["params"], group["params"])
        for number, (position, parameter, part) in enumerate(mine, count):
            state = packed["state"].get(position)
            if state is not None:
                plain["state"][number] = _cut(state, parameter, part)
        plain["param_groups"].append(_group(group, [*range(count, count + len(mine))]))
        count += len(mine)
    return plain


def merge(state: dict[str, Any], optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """The state of a plain model's optimizer, as an optimizer of the optimized model has it.

    Args:
        state: the state dict of an optimizer of the plain model, whose param groups were made as
            those of `optimizer`.
        optimizer: an optimizer of `model`'s parameters, with the same param groups; it stays as
            it is.
        model: the optimized model.

    Returns:
        A state dict for `optimizer.load_state_dict`.

    Raises:
        TypeError: `state` is no state dict of an optimizer, `optimizer` is no optimizer, or `model`
            is no module.
        ValueError: the optimizer has parameters that are not the model's, or wide ones in another
            order, the param groups do not correspond, or siblings' states do not go together: some
            have one and others none, their numbers differ, or they cannot be joined.

    Example:
        >>> import torch, conjoin
        >>> plain = conjoin.nn.Parallel(torch.nn.Linear(8, 2), torch.nn.Linear(8, 3))
        >>> trained = torch.optim.Adam(plain.parameters())
        >>> sum(part.sum() for part in plain(torch.randn(4, 8))).backward()
        >>> trained.step()
        >>> model = conjoin.optimize(plain)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> state = conjoin.checkpoints.merge(trained.state_dict(), optimizer, model)
        >>> [tuple(each["exp_avg"].shape) for each in state["state"].values()]
        [(5, 8), (5,)]
        >>> optimizer.load_state_dict(state)
    """
    slots = _checked_slots(optimizer, model)
    if not isinstance(state, dict) or not {"state", "param_groups"} <= state.keys():
        raise TypeError(
            "expected as state what state_dict() of the plain model's optimizer gives, not "
            f"{'a dict without that' if isinstance(state, dict) else described(state)}. Pass "
            "merge(state, optimizer, model)."
        )
    packed = optimizer.state_dict()
    states: dict[int, dict[str, Any]] = {}
    if len(state["param_groups"]) != len(packed["param_groups"]):
        raise ValueError(
            f"the state has {len(state['param_groups'])} param groups and the optimizer has "
            f"{len(packed['param_groups'])}. Build both optimizers with the same groups."
        )
    groups = []
    for plain, group, held in zip(
        state["param_groups"], packed["param_groups"], optimizer.param_groups, strict=True
    ):
        mine = _held(slots, model, held["params"], group["params"])
        if len(mine) != len(plain["params"]):
            raise ValueError(
                f"a param group of the state has {len(plain['params'])} parameters where the "
                f"plain model has {len(mine)}. Build both optimizers with the same groups."
            )
        parts: dict[int, dict[int, Any]] = {}
        for (position, _, part), number in zip(mine, plain["params"], strict=True):
            found = parts.setdefault(position, {})
            found[0 if part is None else part[2]] = state["state"].get(number)
        for position, parameter, part in mine:
            whole = _join(parts[position], parameter, part)
            if whole is not None:
                states[position] = whole
        groups.append(_group(plain, group["params"]))
    return {"state": states, "param_groups": groups}


def _group(settings: dict[str, Any], numbers: list[int]) -> dict[str, Any]:
    """A param group of other parameters, for which who loads it keeps names of its own."""
    return {k: v for k, v in settings.items() if k != "param_names"} | {"params": numbers}


def _checked_slots(optimizer: object, model: object) -> list[_Slot]:
    """The plain model's parameters, for an optimizer that has no others.

    Raises:
        TypeError: they are no optimizer and no module.
        ValueError: the optimizer has others, whose state would be lost.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"expected a torch.optim.Optimizer as optimizer, not {described(optimizer)}. Pass the "
            "one that was built over the optimized model's parameters."
        )
    check_model(model)
    slots = list(_slots(cast(nn.Module, model)))
    if isinstance(optimizer, LBFGS) and any(part is not None for _, part in slots):
        raise ValueError(
            "LBFGS keeps one state for all parameters, in their order, which is another one in the "
            "plain model. Start the optimizer afresh, or keep the model as it is."
        )
    known = {key for parameter, part in slots for key in (id(parameter), part)}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    others = sum(_key(parameter) not in known for parameter in held)
    if others:
        raise ValueError(
            f"{others} of the optimizer's {len(held)} parameters are none of the model's. Pass the "
            "model whose parameters it was built over; for several models, one that holds them all."
        )
    return slots


def _slots(model: nn.Module) -> Iterator[_Slot]:
    """The plain model's parameters in the order of its `parameters()`."""
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, (Wide, Product)):  # Its owner has its Parameters in their places.
            continue
        if isinstance(module, View):
            yield from (slot for name in TENSORS for slot in _parts(module, name))
            continue
        for own in module._parameters:
            holder, name = lender(module, own)
            parameter = holder._parameters.get(name)
            if isinstance(holder, View):
                yield from _parts(holder, name)
            elif parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter, None


def _parts(view: View, name: str) -> Iterator[_Slot]:
    """A view's part of the weight or bias, if it has one."""
    wide = view.wide_layer
    tensor = getattr(wide, name)
    if tensor is not None and wide.holds(name, view.conjoin_index):
        yield tensor, (wide, name, view.conjoin_index)


def _held(
    slots: Sequence[_Slot], model: nn.Module, parameters: Sequence[Tensor], numbers: Sequence[int]
) -> list[_Held]:
    """The slots that an optimizer has among `parameters`, whole or, by one part, alone.

    They are in the order that they have in a plain model's optimizer: that of `parameters`, and
    where there are wide ones among these, that of the model, so that `parameters` must have it.

    Raises:
        ValueError: they have another one.
    """
    index: dict[object, int] = {
        _key(parameter): number for parameter, number in zip(parameters, numbers, strict=True)
    }
    found: list[_Held] = []
    for parameter, part in slots:
        if id(parameter) in index:
            found.append((index[id(parameter)], parameter, part))
        elif part in index:
            found.append((index[part], parameter, None))
    alone = [number for number, _, part in found if part is None]
    if len(alone) == len(found):
        return sorted(found, key=lambda held: held[0])
    wholes = [index[id(parameter)] for parameter in model.parameters() if id(parameter) in index]
    if alone != sorted(alone) or wholes != sorted(wholes):
        raise ValueError(
            "the parameters of a param group are in another order than model.parameters() gives "
            "them, which does not tell where the parts of a wide one are in a plain model's "
            "optimizer. Build each group by going through the model, or give each of its modules a "
            "group."
        )
    return found


def _key(parameter: Tensor) -> object:
    if isinstance(parameter, Part) and isinstance(view := parameter.conjoin_view, View):
        return view.wide_layer, parameter.conjoin_name, view.conjoin_index
    return id(parameter.whole() if isinstance(parameter, Part) else parameter)


def _cut(
    state: dict[str, Any], parameter: nn.Parameter, part: tuple[Wide, str, int] | None
) -> dict[str, Any]:
    if part is None:
        return state
    wide, name, index = part
    return {
        key: wide.part(name, value, index).clone()
        if _shaped(key, value, parameter)
        else copy.deepcopy(value)  # A step that is a tensor must not be counted by all the parts.
        for key, value in state.items()
    }


def _join(
    states: dict[int, Any], parameter: nn.Parameter, part: tuple[Wide, str, int] | None
) -> dict[str, Any] | None:
    """The states of all parts of a parameter, by their numbers, as one."""
    if part is None:
        return states[0]  # type: ignore[no-any-return]
    present = [state for _, state in sorted(states.items()) if state is not None]
    if not present:
        return None
    wide, name, _ = part
    if len(present) < len(states) or any(state.keys() != present[0].keys() for state in present):
        raise ValueError(
            f"some parts of a wide {name} have optimizer state and others have none. Start the "
            "optimizer afresh, or step once with gradients for all siblings before saving."
        )
    joined: dict[str, Any] = {}
    own = [wide.part(name, parameter.detach(), index) for index in sorted(states)]
    for key, first in present[0].items():
        values = [state[key] for state in present]
        if all(map(_shaped, itertools.repeat(key), values, own)):
            joined[key] = wide.kind.merge(wide, name, values)
        elif all(bool(torch.as_tensor(value == first).all()) for value in values):
            joined[key] = first
        else:
            raise ValueError(
                f"the siblings' {key} differs in the optimizer's state: {values}, and one wide "
                "parameter has one. Start the optimizer afresh, or keep the model as it is."
            )
    return joined


def _shaped(key: str, value: object, parameter: Tensor) -> bool:
    """Whether state is of the parameter's shape.

    Raises:
        ValueError: it is neither that nor a single number.
    """
    if not isinstance(value, Tensor) and any(map(_is_large, pytree.tree_leaves(value))):
        raise ValueError(
            f"the optimizer's {key} holds tensors in a {type(value).__name__}, which cannot be "
            "divided among siblings. Start the optimizer afresh, or keep the model as it is."
        )
    if not isinstance(value, Tensor) or not _is_large(value):
        return False
    if value.shape != parameter.shape:
        raise ValueError(
            f"the optimizer's {key} has the shape {tuple(value.shape)} for a parameter of shape "
            f"{tuple(parameter.shape)}, so it cannot be divided among siblings. Start the "
            "optimizer afresh, or keep the model as it is."
        )
    return True


def _is_large(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0
