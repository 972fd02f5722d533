"""Owners: modules whose own Parameters are merged, so that `self.w` is a part of a wide weight.

A Parameter that is read in a product, `x @ self.w`, is lent to a `Product`, a layer that stands
among the owner's children, is merged there like any layer, and is hidden from whoever asks for
children. In the owner, None keeps the Parameter's place. The owner's class becomes a subclass that
finds `self.w` at the product, and saves and loads it under its old name in its old place.
Whatever is done to the owner's `w` that a part cannot have gives it its own Parameter back.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

from torch import Tensor, fx, nn

from conjoin.layers.checks import tensors
from conjoin.layers.enclosing import listing
from conjoin.layers.part import unshared
from conjoin.layers.product import SUFFIX, Product
from conjoin.layers.releasing import take_out
from conjoin.layers.subclass import made_of
from conjoin.layers.view import DATA_PARALLEL, View

LENT = "conjoin_lent"
"""The attribute of an owner: for each name of a Parameter that it lent, to whom and as what."""

OWN_COPYING = ("__reduce__", "__reduce_ex__", "__getstate__", "__getattribute__", "__slots__")
"""What a subclass of conjoin's would get in the way of."""


class Owner(nn.Module):
    """A module that lent Parameters; always together with its own class, see `owner_class`.

    It defines no names of its own that might be the user's.
    """

    conjoin_base: type[nn.Module]
    conjoin_names: tuple[str, ...]
    conjoin_lent: Mapping[str, tuple[str, str]] = MappingProxyType({})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Not the user's: an owner is no new class of theirs."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Assigning a Parameter that was lent gives its product's others back."""
        if _lends(self, name):
            if not (value is None or isinstance(value, nn.Parameter)):
                super().__setattr__(name, value)  # Raises what PyTorch says of it.
            _reclaim(self, name)
        super().__setattr__(name, unshared(value))
        if name == "training":
            for product in _products(self).values():
                product.training = value

    def __delattr__(self, name: str) -> None:
        """Deleting a Parameter that was lent gives its product's others back."""
        if _lends(self, name):
            _reclaim(self, name)
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """A Parameter of the module's own, also in the place of one that was lent."""
        if _lends(self, name):
            _reclaim(self, name)
        super().register_parameter(name, param)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The module's own children."""
        products = _products(self)
        return ((name, child) for name, child in super().named_children() if name not in products)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As of any module; of this module alone, the parts at their old names and places."""
        if recurse or listing()[1] == DATA_PARALLEL:
            yield from super().named_parameters(prefix, recurse, remove_duplicate)
            return
        with _filled(self, {name: lent(self, name) for name, _ in _places(self)}):
            found = list(super().named_parameters(prefix, recurse, remove_duplicate))
        yield from found

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Also the products, which are not among the children."""
        for product in list(_products(self).values()):
            product._apply(fn)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        held = {name: lent(self, name, slices=not keep_vars) for name, _ in _places(self)}
        with _filled(self, held):
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """PyTorch's own loading, on Parameters that are slices of the wide layers'."""
        parameters: dict[str, dict[str, nn.Parameter]] = {}
        for key, product in _products(self).items():
            own = product.slices() if isinstance(product, View) else tensors(product)
            parameters[key] = own
        held = {name: parameters[key][tensor] for name, (key, tensor) in _places(self)}
        with _filled(self, held):
            super()._load_from_state_dict(*args, **kwargs)
            loaded = {name: self._parameters[name] for name in held}
        for name, (key, tensor) in _places(self):
            parameters[key][tensor] = cast(nn.Parameter, loaded[name])
        for key, product in _products(self).items():
            if isinstance(product, View):
                product.settle(parameters[key])
            else:
                product._parameters.update(parameters[key])

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new_owner, (self.conjoin_base, self.conjoin_names), self.__dict__.copy()


def _lends(owner: Owner, name: str) -> bool:
    """Whether a Parameter is lent: None is in its place, where nobody has put anything.

    A shallow copy of the owner may have taken it back for both.
    """
    place = owner.conjoin_lent.get(name)
    if place is None:
        return False
    return place[0] in owner._modules and owner._parameters.get(name, owner) is None


def _places(owner: Owner) -> list[tuple[str, tuple[str, str]]]:
    """The Parameters that are lent, each with the name of its product and its name there."""
    return [(name, place) for name, place in owner.conjoin_lent.items() if _lends(owner, name)]


def _products(owner: Owner) -> dict[str, Product]:
    """The products by their names among the children."""
    keys = dict.fromkeys(key for key, _ in owner.conjoin_lent.values())
    return {key: cast(Product, owner._modules[key]) for key in keys if key in owner._modules}


def lent(owner: nn.Module, name: str, *, slices: bool = False) -> Any:
    """The Parameter that an owner lent, or what is its part of the wide one.

    Args:
        owner: the owner.
        name: the Parameter's name.
        slices: whether to give a plain slice where it is a part.
    """
    key, tensor = vars(owner)[LENT][name]
    product = owner._modules[key]
    if slices and isinstance(product, View):
        return product.slice_of(tensor)
    return getattr(product, tensor)


def lent_to(module: nn.Module) -> dict[str, dict[str, str]]:
    """The names of the Parameters of a module by those in the product that has them, by product."""
    found: dict[str, dict[str, str]] = {}
    for name, (key, tensor) in _places(module) if isinstance(module, Owner) else ():
        found.setdefault(key, {})[tensor] = name
    return found


def lender(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the Parameter `name` of `module`, and its name there."""
    place = vars(module).get(LENT, {}).get(name)
    if place is None:
        return module, name
    return cast(nn.Module, module._modules[place[0]]), place[1]


@contextlib.contextmanager
def _filled(owner: Owner, held: dict[str, Any]) -> Iterator[None]:
    """With `held` in the places of the Parameters that were lent."""
    owner._parameters.update(held)
    try:
        yield
    finally:
        owner._parameters.update(dict.fromkeys(held))


def copies_itself(cls: type) -> bool:
    """Whether a class of modules says itself how to copy one."""
    before = cls.__mro__[: cls.__mro__.index(nn.Module)]
    return any(name in vars(base) for base in before for name in OWN_COPYING)


def raw_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The Parameters that modules of the user's own classes hold themselves, by qualified name."""
    for prefix, module in model.named_modules():
        if _holds_raw(module):
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    yield f"{prefix}.{name}".lstrip("."), parameter


class Held(nn.Module):
    """A module of an exported program, of which no more is known than its tensors."""


def _holds_raw(module: nn.Module) -> bool:
    """Whether a module is of a class of the user's, or a container of Parameters."""
    own = not type(module).__module__.startswith(("torch.", "conjoin."))
    # A GraphModule keeps Parameters in plain modules at the places of those that it was traced of.
    plain = type(module) is nn.Module
    holders = (fx.GraphModule, nn.ParameterList, nn.ParameterDict, Held)
    return own or plain or isinstance(module, holders)


def may_lend(owner: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether Parameters of a module can be lent without getting in the way of anything."""
    cls = type(owner)
    plain = cls if not isinstance(owner, Owner) else owner.conjoin_base
    if "conjoin_base" in vars(plain) or (isinstance(owner, Owner) and cls.__mro__[1] is not Owner):
        return False
    if not _holds_raw(owner) or (copies_itself(plain) and not isinstance(owner, fx.GraphModule)):
        return False
    if isinstance(owner, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return False  # They go through all children.
    free = not any(hasattr(owner, name + SUFFIX) or hasattr(plain, name) for name in names)
    held = all(owner._parameters.get(name) is not None for name in names)
    return free and held and _has_subclasses(plain)


def _has_subclasses(cls: type[nn.Module]) -> bool:
    """Whether a subclass can be made, which a metaclass of the user's may refuse."""
    try:
        owner_class(cls, ("conjoin_probe",))
    except Exception:  # noqa: BLE001 - Whatever the metaclass raises.
        return False
    return True


def lend(owner: nn.Module, product: Product, names: dict[str, str]) -> None:
    """Gives Parameters of a module to a product, which holds them already.

    Args:
        owner: a module that may lend them.
        product: becomes a hidden child of it.
        names: the names of the Parameters in the owner, by those in the product.
    """
    key = names["weight"] + SUFFIX
    before: tuple[str, ...] = ()
    base = type(owner)
    if isinstance(owner, Owner):
        base, before = owner.conjoin_base, owner.conjoin_names
    places = {name: (key, tensor) for tensor, name in names.items()}
    vars(owner)[LENT] = {**vars(owner).get(LENT, {}), **places}
    owner.__class__ = owner_class(base, tuple(sorted({*before, *places})))
    owner._parameters.update(dict.fromkeys(places))
    product.training = owner.training
    owner._modules[key] = product
    if isinstance(owner, fx.GraphModule):
        owner.recompile()


def reclaim(module: nn.Module) -> None:
    """Gives an owner back what it lent to products that are not merged, and its own class."""
    if not isinstance(module, Owner):
        return
    for name, (key, _) in list(module.conjoin_lent.items()):
        if name in module.conjoin_lent and not isinstance(module._modules.get(key), View):
            _reclaim(module, name)
    if not module.conjoin_lent and type(module).__mro__[1] is Owner:
        module.__class__ = module.conjoin_base  # type: ignore[assignment]
        vars(module).pop(LENT, None)
        if isinstance(module, fx.GraphModule):  # Its class holds the code.
            module.recompile()


def _reclaim(owner: Owner, name: str) -> None:
    """Gives an owner back the Parameters of the product that has this one."""
    key, _ = owner.conjoin_lent[name]
    product = owner._modules.get(key)
    if isinstance(product, View):
        product = take_out(product)
    for own, (other, tensor) in _places(owner):
        if other == key:
            owner._parameters[own] = cast(nn.Module, product)._parameters[tensor]
    lent = {own: place for own, place in owner.conjoin_lent.items() if place[0] != key}
    vars(owner)[LENT] = lent
    owner._modules.pop(key, None)


def owner_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The class of `base` modules that lent Parameters of these names; `base` itself for none."""
    if not names:
        return base
    return cast("type[Owner]", made_of(base, (Owner, names), lambda: _owner_class(base, names)))


def _owner_class(base: type[nn.Module], names: tuple[str, ...]) -> type:
    content: dict[str, Any] = {
        "conjoin_base": base,
        "conjoin_names": names,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        **{name: _place_of(name) for name in names},
    }
    plain = base
    if issubclass(base, fx.GraphModule):  # Its own class holds nothing but compiled code.
        plain = base.__bases__[0]
        content |= _OF_GRAPHS
    return type(base.__name__, (Owner, plain), content)


def _copied_graph(self: Any, memo: dict[int, Any]) -> Any:
    """A copy of a GraphModule that lent Parameters, which makes a copy of its own class."""
    owned, self.__class__ = type(self), self.conjoin_base
    try:
        copied = copy.deepcopy(self, memo)
    finally:
        self.__class__ = owned
    return _owning(copied, self.conjoin_lent, [*self._parameters])


def _reduced_graph(self: Any, protocol: Any) -> tuple[Any, ...]:
    """How a GraphModule that lent Parameters is pickled: by its code, as any GraphModule."""
    made = fx.GraphModule.__reduce__(self)
    return _unpickled_graph, (made, dict(self.conjoin_lent), [*self._parameters])


def _unpickled_graph(made: tuple[Any, Any], lent: Mapping[str, Any], order: list[str]) -> Any:
    function, arguments = made
    return _owning(function(*arguments), lent, order)


def _owning(module: Any, lent: Mapping[str, Any], order: Sequence[str]) -> Any:
    """A GraphModule as the owner that it is a copy of."""
    vars(module)[LENT] = dict(lent)
    held = module._parameters
    vars(module)["_parameters"] = {name: held.get(name) for name in order}
    module.__class__ = owner_class(type(module), tuple(sorted(lent)))
    module.recompile()
    return module


_OF_GRAPHS = {"__deepcopy__": _copied_graph, "__reduce_ex__": _reduced_graph}
"""What an owner that is a GraphModule has, which has a class of its own and is made of its code."""


def _place_of(name: str) -> property:
    """The attribute of an owner where a Parameter was; anything may be put there later."""

    def get(self: Owner) -> Tensor:
        if _lends(self, name):
            return lent(self, name)  # type: ignore[no-any-return]
        if name in self.__dict__:
            return self.__dict__[name]  # type: ignore[no-any-return]
        raise AttributeError(name)  # Python goes on to look among the parameters.

    def put(self: Owner, value: Any) -> None:
        self.__dict__[name] = value

    def delete(self: Owner) -> None:
        if name not in self.__dict__:
            raise AttributeError(name)
        del self.__dict__[name]

    return property(get, put, delete)


def _new_owner(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    cls = owner_class(base, names)
    return cls.__new__(cls)
