"""`Sandbox`: runs functions on the modules of a region, and notes or refuses what they read.

The user's functions are run as copies whose globals are looked up here, and so are the attributes
of the region's modules. So what Python decides during a trace, a condition or the length of a loop,
depends on nothing but what is noted, and a plan can look at each call whether that is still so.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from conjoin.graph.hazards import DISTRIBUTIONS
from conjoin.layers.owner import Owner
from conjoin.layers.subclass import plain_class
from conjoin.layers.view import View
from conjoin.reachable import TRUSTED, is_full, is_trusted
from conjoin.tracing.proxies import UnsoundError
from conjoin.tracing.sandbox import asking, attributes, bytecode
from conjoin.tracing.sandbox.allowed import (
    BUILTINS,
    FACTORIES,
    MADE,
    PACKAGES,
    PLAIN_FORWARDS,
    SPECIAL_METHODS,
    functions,
)
from conjoin.tracing.sandbox.classes import static, users_classes
from conjoin.tracing.sandbox.constants import MUTABLE, frozen, is_constant, is_container, snapshots
from conjoin.tracing.sandbox.objects import MISSING, Place, is_object, standing_in
from conjoin.tracing.sandbox.stand_ins import (
    GRAD_MODES,
    Class,
    Getter,
    Globals,
    GradMode,
    Package,
)

FUNCTION_PARTS = ("__code__", "__defaults__", "__kwdefaults__")
"""The attributes of a function that tell what it does."""


class Sandbox:
    """Runs functions on the modules of one region, and notes what they read.

    Attributes:
        record: puts a call of a function into the graph, whatever the arguments are.
        parameter: gives what stands for a Parameter that was lent to a product, by its path.
        lent: the Parameters that were lent and read: where the product stands, and as what.
        asks_none: whether any code asks if a value is None.
        handed_out: where containers and objects are held, and what the code got for them.
        waiting: the contexts that were made and not entered.
        stack: the modules whose forward runs, and has not ended.
        modes: paths of modules whose `training` was read, and what it was.
        attributes: paths of modules, which dictionary of theirs, a name in it, and the value.
        present: paths of modules, which dictionary, and the name of what must not be None.
        children: paths of modules, and the names of their children.
        places: paths of modules, and the names of children that were reached.
        contents: where containers are held, and what is in them.
        objects: where objects are held, and their classes.
        settings: where attributes of objects are, and the constants that they are.
        stored: paths of modules, and names of attributes that were set, and to what.
        classes: classes and functions, the names of attributes of theirs, and the values.
        globals: namespaces, names in them, and the values.
        cells: variables of enclosing functions, and their values.
        shared: containers that are globals or attributes of classes, and what is in them.
    """

    def __init__(
        self, region: nn.Module, record: Callable[..., Any], parameter: Callable[[str], Any]
    ) -> None:
        self.record = record
        self.parameter = parameter
        self.paths = {module: path for path, module in region.named_modules()}
        self.lent: dict[str, tuple[str, str]] = {}
        self.asks_none = False
        self.handed_out: dict[Place, Any] = {}
        self.waiting: list[GradMode] = []
        self.stack: list[nn.Module] = [region]
        self.modes: dict[str, bool] = {}
        self.attributes: dict[tuple[str, str, str], Any] = {}
        self.present: dict[tuple[str, str, str], None] = {}
        self.children: dict[str, tuple[str, ...]] = {}
        self.places: dict[tuple[str, str], None] = {}
        self.contents: dict[Place, Any] = {}
        self.objects: dict[Place, type] = {}
        self.settings: dict[Place, Any] = {}
        self.stored: dict[tuple[str, str], Any] = {}
        self.classes: dict[tuple[type | FunctionType, str], Any] = {}
        self.globals: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
        self.cells: dict[int, tuple[CellType, Any]] = {}
        self.shared: dict[int, tuple[Any, Any]] = {}
        self._held: list[tuple[Any, Any]] = []
        self._copies: dict[FunctionType, FunctionType] = {}
        self._globals: dict[int, Globals] = {}
        self._busy = False
        for cls in {plain_class(module) for module in self.paths}:
            if any(SPECIAL_METHODS & vars(base).keys() for base in users_classes(cls)):
                self.refuse(f"{cls.__name__} defines a method that Python runs by itself")

    def refuse(self, why: str) -> NoReturn:
        """Ends the trace."""
        raise UnsoundError(why)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Reads and sets the attributes of modules here for a while."""

        def read(module: nn.Module, name: str) -> Any:
            if self._busy:
                return object.__getattribute__(module, name)
            own = type(sys._getframe(1).f_globals) is Globals
            found = self.look_up(module, name, own=own)
            return found.function(module) if type(found) is Getter else found

        setters = {cls: vars(cls)["__setattr__"] for cls in (nn.Module, Owner, View)}
        nn.Module.__getattribute__ = read  # type: ignore[method-assign,assignment]
        for cls, plain in setters.items():
            cls.__setattr__ = self._setter(plain)  # type: ignore[method-assign]
        try:
            yield
        finally:
            del nn.Module.__getattribute__
            for cls, plain in setters.items():
                cls.__setattr__ = plain  # type: ignore[method-assign]
        self._check_unchanged()

    def look_up(self, module: nn.Module, name: str, *, own: bool) -> Any:
        """An attribute of a module, or the getter of a property."""
        self._busy = True
        try:
            return attributes.read(self, module, name, own=own)
        finally:
            self._busy = False

    def _check_unchanged(self) -> None:
        for value, before in self._held:
            if frozen(value, self.paths, objects=True) != before:
                self.refuse("it changes a container")
        if any(self._globals.values()):
            self.refuse("it changes a global")
        if self.waiting:  # `torch.set_grad_enabled(False)` by itself, which lasts.
            self.refuse("it changes the mode for good")

    def hold(self, value: Any, *, modules: bool = False) -> Any:
        """What is in a container, which has to stay as it is while the functions run.

        Args:
            value: the container.
            modules: whether it may hold modules of the region, and objects.
        """
        before = frozen(value, self.paths if modules else {}, objects=modules)
        self._held.append((value, before))
        return before

    def _reach(self, value: Any) -> None:
        """Notes where the modules in a container stand in the region."""
        for container, _ in snapshots([value]):
            for item in container.values() if isinstance(container, dict) else container:
                if isinstance(item, nn.Module):
                    names = self.paths[item].split(".")
                    for end in range(len(names)):
                        self.places[".".join(names[:end]), names[end]] = None

    def is_held(self, value: object) -> bool:
        """Whether a container is one that is not made anew on every call."""
        return any(value is inner for held, _ in self._held for inner, _ in snapshots(held))

    def run(self, function: FunctionType) -> FunctionType:
        """A copy of a function that runs here."""
        if function not in self._copies:
            self.asks_none |= bytecode.check(function)
            for value in (
                *(function.__defaults__ or ()),
                *(function.__kwdefaults__ or {}).values(),
            ):
                if not (is_constant(value) or is_container(value)):
                    self.refuse("the default of an argument is no constant")
                self.given(value, "the default of an argument")
            for part in FUNCTION_PARTS:
                self.classes[function, part] = getattr(function, part)
            space, cells = function.__globals__, function.__closure__ or ()
            copies = tuple(CellType() for _ in cells)
            copied = FunctionType(
                function.__code__,
                self._globals.setdefault(id(space), Globals(self, space)),
                function.__name__,
                function.__defaults__,
                copies,
            )
            copied.__kwdefaults__ = function.__kwdefaults__
            self._copies[function] = copied  # Before the cells, which may lead to it again.
            names = function.__code__.co_freevars
            for name, cell, copy in zip(names, cells, copies, strict=True):
                copy.cell_contents = self._enclosed(name, cell)
        return self._copies[function]

    def _enclosed(self, name: str, cell: CellType) -> Any:
        """A variable of an enclosing function."""
        if not is_full(cell):
            self.refuse(f"it reads {name}")
        value = cell.cell_contents
        if name == "__class__":  # What `super()` is about.
            return value
        self.cells[id(cell)] = cell, value
        return self.given(value, name)

    def load(self, namespace: dict[str, Any], name: str) -> Any:
        """A global."""
        value = namespace.get(name, MISSING)
        self.globals[id(namespace), name] = namespace, name, value
        if value is not MISSING:
            return self.given(value, name)
        special: dict[str, Callable[..., Any]] = {
            "isinstance": asking.is_instance,
            "hasattr": asking.has_attribute,
            "getattr": asking.get_attribute,
            "super": asking.super_of,
        }
        if name in special:
            return functools.partial(special[name], self)
        if name not in BUILTINS:
            self.refuse(f"it reads {name}")
        return BUILTINS[name]

    def member(self, package: ModuleType, name: str) -> Any:
        """What a module of functions has."""
        value = vars(package).get(name, MISSING)
        if package in PACKAGES:
            if package is math and callable(value):
                return value
        elif package.__name__.split(".")[0] in TRUSTED:
            self.refuse(f"it reads {package.__name__}.{name}")
        else:
            self.globals[id(vars(package)), name] = vars(package), name, value
        if value is MISSING:
            self.refuse(f"it reads {package.__name__}.{name}")
        return self.given(value, name)

    def of_class(self, cls: type, name: str) -> Any:
        """An attribute of a class, by its name."""
        if issubclass(cls, enum.Enum) and name in cls.__members__:
            return self.given(cls.__members__[name], name)
        found = static(cls, name)
        if isinstance(found, staticmethod):
            found = found.__func__
        if is_trusted(cls) or not (type(found) is FunctionType or is_constant(found)):
            self.refuse(f"it reads {cls.__name__}.{name}")
        self.classes[cls, name] = found
        return self.given(found, name)

    def made(self, cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
        """A module that the code makes and that holds nothing but these settings."""
        if cls not in MADE or not all(map(is_constant, (*args, *kwargs.values()))):
            self.refuse(f"it makes a {cls.__name__}")
        self.classes[cls, "forward"] = vars(cls)["forward"]
        module: nn.Module = cls(*args, **kwargs)
        return module

    def of_super(self, cls: type, module: nn.Module, name: str) -> Any:
        """A method of a base class."""
        mro = plain_class(module).__mro__
        for base in mro[mro.index(cls) + 1 :]:
            found = vars(base).get(name, MISSING)
            if type(found) is FunctionType:
                self.classes[base, name] = found
                if not is_trusted(base):
                    return MethodType(self.run(found), module)
                if name == "forward" and (base in PLAIN_FORWARDS or base is nn.Sequential):
                    return MethodType(found, module)
            if found is not MISSING:
                break
        return self.refuse(f"it reads super().{name}")

    def forward_of(self, module: nn.Module) -> Callable[..., Any]:
        """The forward of a module's class."""
        cls = plain_class(module)
        found = inspect.getattr_static(cls, "forward")
        if path := self.paths[module]:  # Whatever stands before the region's own has called it.
            self.attributes[path, "__dict__", "forward"] = MISSING
        self.classes[cls, "forward"] = found
        if "forward" in object.__getattribute__(module, "__dict__"):
            self.refuse("its forward was replaced")
        if type(found) is not FunctionType:
            self.refuse("its forward is no plain function")
        return found if is_trusted(found) else self.run(found)

    def _setter(self, plain: Callable[..., None]) -> Callable[..., None]:
        def write(module: nn.Module, name: str, value: Any) -> None:
            if type(sys._getframe(1).f_globals) is Globals:
                attributes.write(self, module, name, value)
            else:
                plain(module, name, value)

        return write

    def hand_out(self, value: Any, place: Place) -> Any:
        """A container or an object that a module holds, with stand-ins for objects."""
        if place not in self.handed_out:
            if is_container(value):
                self.contents[place] = self.hold(value, modules=True)
                self._reach(value)
            self.handed_out[place] = standing_in(self, value, place)
            if self.handed_out[place] is not value and is_container(value):
                self.hold(self.handed_out[place], modules=True)
        return self.handed_out[place]

    def of_object(self, value: Any, place: Place) -> Any:
        """What an attribute of an object is."""
        if is_container(value) or is_object(value):
            return self.hand_out(value, place)
        self.settings[place] = value
        return self.given(value, str(place[1][-1]))

    def given(self, value: Any, name: str) -> Any:
        """A value that is handed to the code, or what stands for it.

        Raises:
            UnsoundError: it need not be the same on every call.
        """
        if is_constant(value):
            return value
        if type(value) in MUTABLE or type(value) is tuple:
            if id(value) not in self.shared:
                self.shared[id(value)] = value, self.hold(value)
            return value
        if isinstance(value, ModuleType):
            return Package(self, value)
        if value is torch.is_tensor:
            return functools.partial(asking.is_instance, self, info=Tensor)
        if value is vars(torch.jit)["is_scripting"]:
            return _false
        if _is_hashable(value) and value in GRAD_MODES:
            return functools.partial(GradMode, self, *GRAD_MODES[value])
        if isinstance(value, type) and value not in DISTRIBUTIONS:
            return value if value in (torch.finfo, torch.iinfo) else Class(self, value)
        if value is vars(torch)["_assert"]:
            return _assert
        if _is_hashable(value) and value in FACTORIES | DISTRIBUTIONS:
            return functools.partial(self.record, value)
        if _is_hashable(value) and value in functions():
            return value
        if type(value) is FunctionType and not is_trusted(value):
            return self.run(value)
        return self.refuse(f"it reads {name}")


def _false() -> bool:
    return False


def _assert(condition: object, message: object) -> None:
    """What `torch._assert` does, which cannot be traced where a tensor decides."""
    assert condition, message


def _is_hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
