"""Where a forward runs while it is traced: all that it reads is noted, and the unknown is refused.

The user's functions are run as copies whose globals are looked up here, and the attributes of the
region's modules are read here too. So what Python decides during a trace, a condition or the
length of a loop, depends on nothing but what is noted, and a plan can look at each call whether
that is still so.
"""

from __future__ import annotations

import builtins
import contextlib
import enum
import functools
import inspect
import math
import sys
from abc import ABCMeta
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from types import CellType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import get_overridable_functions

from conjoin.graph.hazards import DISTRIBUTIONS
from conjoin.layers.owner import LENT, Owner
from conjoin.layers.view import View
from conjoin.reachable import OF_MODULES, TRUSTED, is_full
from conjoin.tracing import bytecode
from conjoin.tracing.known import is_tensor
from conjoin.tracing.objects import MISSING, Object, Place, is_object, standing_in, value_of
from conjoin.tracing.proxies import INNARDS, UnsoundError

BUILTINS: dict[str, Any] = {
    name: getattr(builtins, name)
    for name in (
        "range len zip enumerate list tuple dict set frozenset reversed sorted sum slice min max "
        "abs int float bool str complex any all map filter round divmod pow iter next"
    ).split()
}
"""Built-in functions that give the same on every call and have no effect."""

BUILTINS |= {
    name: value
    for name, value in vars(builtins).items()
    if isinstance(value, type) and issubclass(value, Exception)
}
"""And errors, since an error that is raised ends the trace."""

PACKAGES = (
    torch, nn, F, math, torch.special, torch.fft, torch.linalg, torch.jit, nn.modules,
    torch.distributions, torch.distributions.normal, torch.distributions.categorical,
)  # fmt: skip
"""Modules, beside the user's own, whose functions and constants code may use."""

FACTORIES = frozenset(
    getattr(torch, name)
    for name in (
        "zeros ones empty full arange linspace logspace eye rand randn randint randperm tensor "
        "scalar_tensor"
    ).split()
)
"""Functions that make a tensor of nothing, which a graph repeats."""

NOT_OPERATIONS = frozenset(
    "backward data grad numpy tolist item register_hook retain_grad requires_grad_ share_memory_ "
    "set_ apply_ map_ map2_ storage untyped_storage data_ptr pin_memory resize_ resize_as_ "
    "is_leaf grad_fn requires_grad _version".split()
)
"""What a tensor has beside operations: it leads out of the graph, or differs for a slice."""

LISTINGS = frozenset("children named_children keys items values".split())
"""Methods of PyTorch's modules that depend on nothing but the names of the children."""

PLAIN_FORWARDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.LayerNorm)
"""Classes of PyTorch whose forward may run as that of a base class."""

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
"""Classes of PyTorch that hold modules in order."""

SPECIAL_METHODS = frozenset(
    "__call__ _call_impl _wrapped_call_impl __getattr__ __getattribute__ __setattr__ __iter__ "
    "__len__ __getitem__ __contains__ __bool__ __eq__ __hash__".split()
)
"""Methods that Python runs without their name standing in the code."""

CONSTANTS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
"""Types of value that a trace may take as they are, as long as they are watched."""

MUTABLE = (list, dict, set, OrderedDict)
"""Types of container that a trace may look into, as long as the contents are watched."""

FUNCTION_PARTS = ("__code__", "__defaults__", "__kwdefaults__")
"""The attributes of a function that tell what it does."""

REGISTERED = ("_modules", "_parameters", "_buffers")
"""The attributes of `nn.Module` that hold what it looks for where it has no such attribute."""


class Globals(dict[str, Any]):
    """The globals of a function that runs in a sandbox; the dictionary itself stays empty."""

    def __init__(self, sandbox: Sandbox, namespace: dict[str, Any]) -> None:
        super().__init__()
        self.sandbox, self.namespace = sandbox, namespace

    def __getitem__(self, name: str) -> Any:
        return self.sandbox.load(self.namespace, name)


class Package:
    """A module of functions."""

    def __init__(self, sandbox: Sandbox, package: ModuleType) -> None:
        self._sandbox, self._package = sandbox, package

    def __getattr__(self, name: str) -> Any:
        return self._sandbox.member(self._package, name)


class Class:
    """A class, which is there to be asked for and not to be called."""

    def __init__(self, sandbox: Sandbox, cls: type) -> None:
        self._sandbox, self._cls = sandbox, cls

    def __getattr__(self, name: str) -> Any:
        return self._sandbox.of_class(self._cls, name)


class Super:
    """What `super()` gives."""

    def __init__(self, sandbox: Sandbox, cls: type, module: nn.Module) -> None:
        self._sandbox, self._cls, self._module = sandbox, cls, module

    def __getattr__(self, name: str) -> Any:
        return self._sandbox.of_super(self._cls, self._module, name)


class GradMode:
    """What `torch.no_grad()` and its like give: the graph changes the mode, and changes it back."""

    def __init__(self, sandbox: Sandbox, enabled: object) -> None:
        if type(enabled) is not bool:
            sandbox.refuse("a mode that a tensor decides")
        self._sandbox, self._enabled = sandbox, enabled
        sandbox.waiting.append(self)

    def __enter__(self) -> None:
        record = self._sandbox.record
        self._sandbox.waiting.remove(self)
        self._before = record(torch.is_grad_enabled)
        record(torch._C._set_grad_enabled, self._enabled)

    def __exit__(self, *error: object) -> None:
        self._sandbox.record(torch._C._set_grad_enabled, self._before)


GRAD_MODES: dict[Any, tuple[bool, ...]] = {
    torch.no_grad: (False,),
    torch.enable_grad: (True,),
    torch.set_grad_enabled: (),
}
"""The classes of such contexts, and the mode where it is not an argument of theirs."""


class Getter:
    """The function of a property, to be run by whoever reads it."""

    def __init__(self, function: Callable[[nn.Module], Any]) -> None:
        self.function = function


class Sandbox:
    """Runs functions on the modules of one region, and notes what they read.

    Attributes:
        record: puts a call of a function into the graph, whatever the arguments are.
        parameter: gives what stands for a Parameter that was lent to a product, by its path.
        lent: the Parameters that were lent and read: where the product stands, and as what.
        asks_none: whether any code asks if a value is None.
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
        self._lent_out: dict[Place, Any] = {}
        self._copies: dict[FunctionType, FunctionType] = {}
        self._globals: dict[int, Globals] = {}
        self._busy = False
        for cls in {plain_class(module) for module in self.paths}:
            if any(SPECIAL_METHODS & vars(base).keys() for base in _foreign(cls)):
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
            self._busy = True
            try:
                found = self._read(module, name, own=own)
            finally:
                self._busy = False
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
                self._given(value, "the default of an argument")
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
        return self._given(value, name)

    def load(self, namespace: dict[str, Any], name: str) -> Any:
        """A global."""
        value = namespace.get(name, MISSING)
        self.globals[id(namespace), name] = namespace, name, value
        if value is not MISSING:
            return self._given(value, name)
        special = {
            "isinstance": self._isinstance,
            "hasattr": self._hasattr,
            "getattr": self._getattr,
            "super": self._super,
        }
        if name in special:
            return special[name]
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
        return self._given(value, name)

    def of_class(self, cls: type, name: str) -> Any:
        """An attribute of a class, by its name."""
        if issubclass(cls, enum.Enum) and name in cls.__members__:
            return self._given(cls.__members__[name], name)
        found = _static(cls, name)
        if isinstance(found, staticmethod):
            found = found.__func__
        if _is_trusted(cls) or not (type(found) is FunctionType or is_constant(found)):
            self.refuse(f"it reads {cls.__name__}.{name}")
        self.classes[cls, name] = found
        return self._given(found, name)

    def of_super(self, cls: type, module: nn.Module, name: str) -> Any:
        """A method of a base class."""
        mro = plain_class(module).__mro__
        for base in mro[mro.index(cls) + 1 :]:
            found = vars(base).get(name, MISSING)
            if type(found) is FunctionType:
                self.classes[base, name] = found
                if not _is_trusted(base):
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
        self.attributes[self.paths[module], "__dict__", "forward"] = MISSING
        self.classes[cls, "forward"] = found
        if "forward" in object.__getattribute__(module, "__dict__"):
            self.refuse("its forward was replaced")
        if type(found) is not FunctionType:
            self.refuse("its forward is no plain function")
        return found if _is_trusted(found) else self.run(found)

    def _read(self, module: nn.Module, name: str, *, own: bool) -> Any:
        """An attribute of a module, for the user's `own` code or that of PyTorch."""
        path = self.paths.get(module)
        raw = functools.partial(object.__getattribute__, module)
        if path is None:
            if own:
                self.refuse("it reads a module of somewhere else")
            return raw(name)
        if (path, name) in self.stored:
            return self.stored[path, name]
        held = raw("__dict__")
        if name == "forward" and not own:
            if self.stack[-1] is not module:
                return raw(name)
            return MethodType(self.forward_of(module), module)
        if name == "training":
            if type(held.get(name)) is not bool:
                self.refuse("its training is no flag")
            self.modes[path] = held[name]
            return held[name]
        if own and name == "__getattr__":
            return functools.partial(self._child, module)
        if name in OF_MODULES or name.startswith("__") or name == "_compiled_call_impl":
            if own and name != "_modules":
                self.refuse(f"it reads .{name}")
            if name == "_modules":
                self.children[path] = tuple(held[name])
                self.places |= dict.fromkeys((path, child) for child in held[name])
                return MappingProxyType(held[name]) if own else held[name]
            return raw(name)
        if name in held.get(LENT, {}) and held["_parameters"].get(name, MISSING) is None:
            return self._lent(path, held, name)
        found = _static(plain_class(module), name)
        if isinstance(found, property):
            return self._property(module, name, found, own=own)
        if name in held:
            value = held[name]
            if is_container(value) or (own and is_object(value)):
                return self._held_at(value, (path, (name,)))
            self.attributes[path, "__dict__", name] = value
            return self._given(value, name) if own or is_constant(value) else value
        if found is MISSING:
            if not self._registered(path, held, name):
                self.attributes[path, "__dict__", name] = MISSING
                self.classes[plain_class(module), name] = MISSING
            return raw(name)
        self.attributes[path, "__dict__", name] = MISSING
        return self._inherited(module, name, found, own=own)

    def _setter(self, plain: Callable[..., None]) -> Callable[..., None]:
        def write(module: nn.Module, name: str, value: Any) -> None:
            if type(sys._getframe(1).f_globals) is Globals:
                self._write(module, name, value)
            else:
                plain(module, name, value)

        return write

    def _write(self, module: nn.Module, name: str, value: Any) -> None:
        """Notes an attribute that code sets, for the end of the forward.

        Nobody else may see it before, so a trace in which something is not traced is refused.
        """
        path = self.paths.get(module)
        if path is None or isinstance(module, View) or name in OF_MODULES or name[:2] == "__":
            self.refuse(f"it sets .{name} of a module")
        held = object.__getattribute__(module, "__dict__")
        found = _static(plain_class(module), name)
        registered = any(name in held[holder] for holder in REGISTERED) or name in held.get(
            LENT, {}
        )
        if registered or not (found is MISSING or is_constant(found)):
            self.refuse(f"it sets .{name}, which is no plain attribute")
        if (path, "__dict__", name) in self.attributes or (path, (name,)) in self._lent_out:
            self.refuse(f"it sets .{name}, which it has read")
        for holder in REGISTERED:
            self.attributes[path, holder, name] = MISSING
        self.classes[plain_class(module), name] = found
        self.stored[path, name] = value

    def _held_at(self, value: Any, place: Place) -> Any:
        """A container or an object that a module holds, with stand-ins for objects."""
        if place not in self._lent_out:
            if is_container(value):
                self.contents[place] = self.hold(value, modules=True)
                self._reach(value)
            self._lent_out[place] = standing_in(self, value, place)
            if self._lent_out[place] is not value and is_container(value):
                self.hold(self._lent_out[place], modules=True)
        return self._lent_out[place]

    def of_object(self, value: Any, place: Place) -> Any:
        """What an attribute of an object is."""
        if is_container(value) or is_object(value):
            return self._held_at(value, place)
        self.settings[place] = value
        return self._given(value, str(place[1][-1]))

    def _lent(self, path: str, held: dict[str, Any], name: str) -> Any:
        """A Parameter of a module that lent it."""
        product, tensor = held[LENT][name]
        self.attributes[path, "_parameters", name] = None
        self.places[path, product] = None
        full = f"{path}.{name}".lstrip(".")
        self.lent[full] = f"{path}.{product}".lstrip("."), tensor
        return self.parameter(full)

    def _child(self, module: nn.Module, name: str) -> Any:
        """What `module.__getattr__(name)` gives, which does not look at plain attributes."""
        if name not in object.__getattribute__(module, "_modules"):
            self.refuse(f"it reads {name}")
        return self._getattr(module, name)

    def _registered(self, path: str, held: dict[str, Any], name: str) -> bool:
        """Notes a child, a parameter or a buffer, or that there is none; whether there is one."""
        holders = [holder for holder in REGISTERED if name in held[holder]]
        for holder in holders or REGISTERED:
            value = held[holder].get(name, MISSING)
            if value is MISSING or value is None:
                self.attributes[path, holder, name] = value
            elif holder == "_modules":
                self.places[path, name] = None
            else:
                self.present[path, holder, name] = None
        return bool(holders)

    def _property(self, module: nn.Module, name: str, found: property, *, own: bool) -> Any:
        self.classes[plain_class(module), name] = found
        if type(found.fget) is FunctionType and not _is_trusted(found.fget):
            return Getter(self.run(found.fget))
        if own:
            self.refuse(f"it reads .{name}")
        return object.__getattribute__(module, name)

    def _inherited(self, module: nn.Module, name: str, found: Any, *, own: bool) -> Any:
        """An attribute of the module's class."""
        function = found.__func__ if isinstance(found, staticmethod) else found
        if type(function) is FunctionType:
            self.classes[plain_class(module), name] = function
            if not _is_trusted(function):
                copied = self.run(function)
                return copied if isinstance(found, staticmethod) else MethodType(copied, module)
            if own and name not in LISTINGS:
                self.refuse(f"it calls .{name}")
            return object.__getattribute__(module, name)
        if not own and not is_constant(found):
            return object.__getattribute__(module, name)
        if hasattr(type(found), "__get__") and not callable(found):
            self.refuse(f"it reads .{name}")
        self.classes[plain_class(module), name] = found
        return self._given(found, name)

    def _given(self, value: Any, name: str) -> Any:
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
            return functools.partial(self._isinstance, info=Tensor)
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
        if type(value) is FunctionType and not _is_trusted(value):
            return self.run(value)
        return self.refuse(f"it reads {name}")

    def _super(self, *args: Any) -> Super:
        if not args:
            frame = sys._getframe(1)
            args = frame.f_locals["__class__"], frame.f_locals[frame.f_code.co_varnames[0]]
        cls, module = args
        cls = vars(cls)["_cls"] if isinstance(cls, Class) else cls
        if not isinstance(module, nn.Module) or isinstance(module, View):
            self.refuse("super() of no module")
        return Super(self, cls, module)

    def _hasattr(self, value: Any, name: str) -> bool:
        self._check_object(value)
        return hasattr(value, name)

    def _getattr(self, value: Any, name: str, *default: Any) -> Any:
        if default:
            self._check_object(value)
        if name in INNARDS or name.startswith("__"):
            self.refuse(f"it reads {name}")
        if isinstance(value, nn.Module):
            self._busy = True
            try:
                found = self._read_or_missing(value, name)
            finally:
                self._busy = False
            if found is not MISSING:
                return found.function(value) if type(found) is Getter else found
        return getattr(value, name, *default)

    def _read_or_missing(self, module: nn.Module, name: str) -> Any:
        try:
            return self._read(module, name, own=True)
        except AttributeError:
            return MISSING

    def _check_object(self, value: object) -> None:
        if isinstance(value, (fx.Proxy, Package, Class, Super)):
            self.refuse("it asks what attributes a value has")

    def _isinstance(self, value: Any, info: Any) -> bool:
        classes = [*_classes(info)]
        for cls in classes:
            if type(cls) not in (type, ABCMeta, type(Tensor), enum.EnumMeta):
                self.refuse("it asks for a class that decides by itself")
        if isinstance(value, (Package, Class, Super)):
            self.refuse("it asks for the class of something that is no value")
        if not isinstance(value, fx.Proxy):
            plain = value_of(value) if isinstance(value, Object) else value
            return isinstance(plain, tuple(classes))
        if not is_tensor(value.node, self.paths):
            self.refuse("it asks for the class of a value")
        return issubclass(Tensor, tuple(classes))


def _false() -> bool:
    return False


def _assert(condition: object, message: object) -> None:
    """What `torch._assert` does, which cannot be traced where a tensor decides."""
    assert condition, message


def _classes(info: Any) -> Iterator[type]:
    if type(info) is tuple:
        for item in info:
            yield from _classes(item)
    elif type(info) is Class:
        yield vars(info)["_cls"]
    elif isinstance(info, type):
        yield info
    else:
        raise UnsoundError("it asks for the class of a value in an unknown way")


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, for a view, an owner or a region that of the user's."""
    return plain_of(type(module))


def plain_of(cls: type[nn.Module]) -> type[nn.Module]:
    """The user's class that a class of conjoin's was made of, or the class itself."""
    while "conjoin_base" in vars(cls):
        cls = vars(cls)["conjoin_base"]
    return cls


def _foreign(cls: type) -> Iterator[type]:
    """A class and its bases, but for PyTorch's and conjoin's own."""
    for base in cls.__mro__:
        if base.__module__.split(".")[0] not in ("torch", "conjoin", "builtins"):
            yield base


def _is_trusted(value: Any) -> bool:
    return str(value.__module__).split(".")[0] in TRUSTED


def _is_hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _static(cls: type, name: str) -> Any:
    """What a class or a base of it defines by a name."""
    for base in cls.__mro__:
        if name in vars(base):
            return vars(base)[name]
    return MISSING


def is_constant(value: object) -> bool:
    """Whether a value cannot change."""
    if type(value) is tuple:
        return all(map(is_constant, value))
    if isinstance(value, enum.Enum):
        own = [v for base in _foreign(type(value)) for v in vars(base).values()]
        methods = (v for v in own if type(v) is FunctionType and not _is_trusted(v))
        return is_constant(value.value) and not any(methods)
    return type(value) in CONSTANTS


def is_container(value: object) -> bool:
    """Whether a value holds others, and may change or hold what does."""
    return type(value) in (*MUTABLE, tuple) and not is_constant(value)


def frozen(
    value: Any,
    paths: Mapping[nn.Module, str] = MappingProxyType({}),
    *,
    objects: bool = False,
) -> Any:
    """A container as nested tuples, which are equal only where trace and call cannot differ.

    Args:
        value: the container, or something in it.
        paths: the modules that it may hold, and their paths.
        objects: whether it may hold objects, which are looked at by themselves.

    Raises:
        UnsoundError: it holds something else than constants and these modules.
    """
    cls = type(value)
    if cls is set:
        return (cls, *[frozen(item, paths) for item in value])
    if cls in (list, tuple):
        return (cls, *[frozen(item, paths, objects=objects) for item in value])
    if cls in (dict, OrderedDict):
        items = value.items()
        return (cls, *[(frozen(k, paths), frozen(v, paths, objects=objects)) for k, v in items])
    if objects and (cls is Object or is_object(value)):
        return Object, id(value) if cls is Object else cls
    if isinstance(value, nn.Module) and value in paths:
        return nn.Module, paths[value]
    if cls is float or cls is complex:
        return cls, repr(value)
    if isinstance(value, fx.Proxy):
        return fx.Proxy, id(value)
    if not is_constant(value):
        raise UnsoundError("a container with something else than constants")
    return cls, value


def snapshots(value: Any) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The containers in a container that can change, itself included, and what is in each."""
    if type(value) in (dict, OrderedDict):
        yield value, (*value, *value.values())
        inside: Any = value.values()
    elif type(value) in (list, set, tuple):
        if type(value) is not tuple:
            yield value, tuple(value)
        inside = value
    else:
        return
    for item in inside:
        yield from snapshots(item)


@functools.cache
def functions() -> frozenset[Any]:
    """PyTorch's functions that are recorded in a graph when called with a proxy."""
    found = get_overridable_functions()
    spaces = (torch, F, torch.special, torch.fft, torch.linalg)
    names = {*operations(), *(name for name in vars(torch) if name.endswith("_like"))}
    listed = [f for namespace in spaces for f in found.get(namespace, ())]
    listed += [vars(torch)[name] for name in names & vars(torch).keys()]
    return frozenset(f for f in listed if callable(f) and f.__name__ not in NOT_OPERATIONS)


@functools.cache
def operations() -> frozenset[str]:
    """Names of methods and attributes of tensors that are recorded in a graph."""
    found = get_overridable_functions()
    names = {f.__name__ for space in (torch, F, Tensor) for f in found.get(space, ())}
    names |= {"shape", "dtype", "device", "ndim", "T", "mT", "H", "mH", "real", "imag"}
    names |= {"values", "indices", "is_floating_point", "is_complex"}
    return frozenset(names - NOT_OPERATIONS)
