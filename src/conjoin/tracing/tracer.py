"""The tracer of a region, which runs the forward in the sandbox."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from conjoin.graph import hazards
from conjoin.layers.subclass import plain_class
from conjoin.tracing.proxies import UnsoundError
from conjoin.tracing.ranks import RESHAPING, Ranked, Ranks
from conjoin.tracing.sandbox.allowed import operations
from conjoin.tracing.sandbox.constants import snapshots
from conjoin.tracing.sandbox.sandbox import Sandbox
from conjoin.tracing.structures import Observed, Structure, names_of, rebuilt

OF_DISTRIBUTIONS = frozenset({"sample", "rsample", "log_prob", "entropy"})
"""Methods of distributions that change nothing, and give tensors with memory of their own."""


class Tracer(fx.Tracer):
    """Traces one region, in a sandbox."""

    proxy_buffer_attributes = True

    def __init__(
        self,
        region: nn.Module,
        structure: Structure,
        opaque: set[nn.Module],
        observed: Observed,
    ) -> None:
        super().__init__()
        self.structure, self.opaque, self.observed = structure, opaque, observed
        self.ranks = Ranks(region.get_submodule)
        self.reshapes = False
        self.untraced: list[nn.Module] = []
        self.sandbox = sandbox = Sandbox(region, self._record, self._parameter)
        self.lent: dict[str, Any] = {}
        self.tensors: dict[int, list[str]] = {}
        for module, path in sandbox.paths.items():
            for name, tensor in itertools.chain(
                module._parameters.items(), module._buffers.items()
            ):
                if tensor is not None:
                    self.tensors.setdefault(id(tensor), []).append(f"{path}.{name}".lstrip("."))

    def _record(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        return self.create_proxy("call_function", function, args, kwargs)

    def _parameter(self, path: str) -> Any:
        if path not in self.lent:
            self.lent[path] = self.create_proxy("get_attr", path, (), {})
        return self.lent[path]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A proxy that may be asked for its number of dimensions."""
        return Ranked(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the trace does not look into a module."""
        return m in self.opaque

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """What a call of a module gives; the sandbox knows which module's forward runs."""
        if m in self.opaque:
            if type(m).__module__.split(".")[0] not in ("torch", "conjoin"):
                self._refuse_held((args, kwargs))
                self.untraced.append(m)
            return super().call_module(m, forward, args, kwargs)
        if m not in self.sandbox.paths:  # The code has made it.
            return forward(*args, **kwargs)
        self.sandbox.stack.append(m)
        result = super().call_module(m, forward, args, kwargs)
        self.sandbox.stack.pop()
        return result

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: dict[str, Any], *rest: Any, **named: Any
    ) -> Any:
        """A node for an operation that is known, and a proxy for what it gives."""
        if any(is_distribution(each) for each in pytree.tree_leaves((args, kwargs))):
            # What else an object of these may give shares memory with the tensors that it holds.
            if kind != "call_method" or target not in OF_DISTRIBUTIONS:
                raise UnsoundError("it does more with a distribution than draw from it")
        elif kind == "call_method" and target not in operations():
            raise UnsoundError(f"it calls .{target}")
        if target is getattr and args[1] not in operations():
            raise UnsoundError(f"it reads .{args[1]}")
        if target in ("dim", "ndimension") and kind == "call_method":
            rank = self.ranks.rank(args[0].node)
            if rank is not None:
                return rank
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        self.reshapes |= "out" in kwargs or name in RESHAPING
        return super().create_proxy(kind, target, args, kwargs, *rest, **named)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A proxy for a parameter or buffer; everything else is what it is."""
        if not isinstance(attr_val, Tensor):
            return attr_val
        found = self.tensors.get(id(attr_val), [])
        if len(found) != 1:
            raise UnsoundError("a tensor that is not registered, or more than once")
        if found[0] not in parameter_proxy_cache:
            proxy = self.create_proxy("get_attr", found[0], (), {})
            parameter_proxy_cache[found[0]] = proxy
        return parameter_proxy_cache[found[0]]

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Proxies for the tensors of a call of this structure."""
        forward = plain_class(self.root).forward
        proxies = [
            self.create_proxy("placeholder", name, (), {})
            for name in names_of(self.structure, forward)
        ]
        nodes = [proxy.node for proxy in proxies]
        self.ranks.inputs = dict(zip(nodes, self.observed.ranks, strict=False))

        def run(root: nn.Module, *tensors: Any) -> Any:
            args, kwargs = rebuilt(self.structure, iter(tensors))
            for value in (*args, *kwargs.values()):
                if not isinstance(value, fx.Proxy):
                    self.sandbox.hold(value)
            with self.sandbox.entered(), _NothingReal():
                output = self.sandbox.forward_of(root)(root, *args, **kwargs)
            stored = tuple(self.sandbox.stored.values())
            self._refuse_held((output, stored))
            return (output, stored) if stored else output

        run.__annotations__ = {}  # It would be that of the new forward.
        return run, [self.root, *proxies]

    def asked_ranks(self) -> Iterator[tuple[int, int]]:
        """The inputs whose number of dimensions was asked for, by their numbers."""
        for number, (node, rank) in enumerate(self.ranks.inputs.items()):
            if node in self.ranks.asked:
                yield number, rank

    def _refuse_held(self, value: Any) -> None:
        """Refuses to hand out a container of which the graph would make a new one each time."""
        seen: set[int] = set()
        for container, _ in snapshots(value):
            if self.sandbox.is_held(container) or id(container) in seen:
                raise UnsoundError("a container that is not made anew leaves the forward")
            seen.add(id(container))


class _NothingReal(TorchFunctionMode):
    """Stops a trace when an operation runs that does not depend on the forward's arguments."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs))):
            raise UnsoundError(f"{getattr(func, '__name__', func)} runs without the input")
        return func(*args, **kwargs)


def is_distribution(value: Any) -> bool:
    """Whether a value of a trace is an object that stands for a distribution."""
    return isinstance(value, fx.Proxy) and value.node.target in hazards.DISTRIBUTIONS
