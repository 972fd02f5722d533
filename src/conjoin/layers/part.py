"""`Part`: what a view's `weight` or `bias` is; it acts as the Parameter that it was."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from conjoin.layers.releasing import take_out
from conjoin.layers.wide import Sibling


class Part(Tensor):
    """A view's `weight` or `bias`: acts as the Parameter that it was, and stays a slice.

    What goes for the values and the gradient goes through to the wide layer. What one wide
    parameter cannot have for one part only, such as a hook or `requires_grad`, makes the sibling
    a plain layer; from then on this is another name for the plain layer's parameter.
    """

    conjoin_view: nn.Module
    conjoin_name: str
    conjoin_whole: nn.Parameter
    conjoin_address: int
    _is_param = True  # What isinstance(..., nn.Parameter) looks at.

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """A plain tensor's function; gradients with respect to a part are parts of the whole's."""
        kwargs = kwargs or {}
        if func is torch.autograd.grad:
            with torch._C.DisableTorchFunctionSubclass():
                return _gradients(*args, **kwargs)
        if any(each not in (cls, Tensor, nn.Parameter) for each in types):
            # Another class of tensor has the say, and has never heard of this one.
            plain = functools.partial(Tensor.as_subclass, cls=Tensor)
            args, kwargs = pytree.tree_map_only(cls, plain, (args, kwargs))
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def of(cls, view: Sibling, name: str) -> Part:
        """The part of a view, on the graph of the wide layer's parameter in any mode."""
        with torch.inference_mode(False), torch.enable_grad(), _disable_current_modes():
            part = cast(Tensor, view.slice_of(name)).as_subclass(cls)
        part.conjoin_view, part.conjoin_name = view, name
        part.conjoin_whole = part.whole()
        vars(part).update(vars(part.conjoin_whole))
        part.conjoin_address = part.conjoin_whole.data_ptr()
        return part

    def whole(self) -> nn.Parameter:
        """The Parameter that holds it."""
        layer = self.conjoin_view
        holder = layer.wide_layer if isinstance(layer, Sibling) else layer
        return cast(nn.Parameter, holder._parameters[self.conjoin_name])

    def bound(self) -> Part:
        """Itself, on the memory where the values are now.

        Between the meta device and others a Parameter has no way, so another one is there now.
        """
        whole = self.whole()
        moved = whole.data_ptr() != self.conjoin_address
        if moved and torch._has_compatible_shallow_copy_type(self, whole):
            Tensor.data.__set__(self, self.data)  # type: ignore[attr-defined]
            self.conjoin_address = whole.data_ptr()
        return self

    def _of(self, tensor: Tensor) -> Tensor:
        view = self.conjoin_view
        if not isinstance(view, Sibling):
            return tensor
        return view.wide_layer.part(self.conjoin_name, tensor, view.conjoin_index)

    def _alone(self) -> nn.Parameter:
        if isinstance(self.conjoin_view, Sibling):
            take_out(self.conjoin_view)
        return self.whole()

    @property
    def is_leaf(self) -> bool:  # type: ignore[override]
        """True, as of the Parameter that it was."""
        return True

    @property
    def grad_fn(self) -> None:  # type: ignore[override]
        """None, as of the Parameter that it was."""
        return None

    @property
    def data(self) -> Tensor:
        """The values; writing to them, or assigning others, changes the wide layer."""
        return self._of(self.whole().data)

    @data.setter
    def data(self, values: Tensor) -> None:
        own = self.data
        if (values.shape, values.dtype, values.device) == (own.shape, own.dtype, own.device):
            own.copy_(values)
        else:
            self._alone().data = values
            self.bound()

    @property
    def grad(self) -> Tensor | None:
        """The slice of the wide gradient."""
        gradient = self.whole().grad
        return None if gradient is None else self._of(gradient)

    @grad.setter
    def grad(self, gradient: Tensor | None) -> None:
        whole = self.whole()
        if not isinstance(self.conjoin_view, Sibling):
            whole.grad = gradient
            return
        self.data.grad = gradient  # Raises what PyTorch says of a gradient that does not fit.
        if whole.grad is None:
            whole.grad = torch.zeros_like(whole)
        with torch.no_grad():
            part = self._of(whole.grad)
            part.zero_() if gradient is None else part.copy_(gradient)

    @property
    def requires_grad(self) -> bool:
        """Whether it trains; assigning makes the sibling a plain layer."""
        return self.whole().requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if value != self.requires_grad:
            self._alone().requires_grad = value

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Freezes or thaws this parameter alone."""
        self.requires_grad = requires_grad
        return getattr(self.conjoin_view, self.conjoin_name)

    def set_(self, *args: Any, **kwargs: Any) -> Any:
        """Makes the sibling a plain layer, and gives its parameter other memory."""
        self._alone().set_(*args, **kwargs)
        return self.bound()

    def register_hook(self, hook: Any) -> Any:
        """Makes the sibling a plain layer, and registers the hook on its parameter."""
        return self._alone().register_hook(hook)  # type: ignore[no-untyped-call]

    def register_post_accumulate_grad_hook(self, hook: Any) -> Any:
        """Makes the sibling a plain layer, and registers the hook on its parameter."""
        return self._alone().register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        return nn.Parameter(self.data.clone(), requires_grad=self.requires_grad)

    def __reduce_ex__(self, protocol: Any) -> Any:
        own = nn.Parameter(self.data.clone(), self.requires_grad)
        return own.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Parameter containing:\n{self.data!r}"


def _gradients(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """`torch.autograd.grad` with respect to `inputs`, some of which are parts."""
    inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    wholes = [each.whole() if isinstance(each, Part) else each for each in inputs]
    distinct = list({id(whole): whole for whole in wholes}.values())
    found = torch.autograd.grad(outputs, distinct, *args, **kwargs)
    gradients = {id(whole): grad for whole, grad in zip(distinct, found, strict=True)}
    pairs = [(each, gradients[id(whole)]) for each, whole in zip(inputs, wholes, strict=True)]
    return tuple(
        each._of(grad) if isinstance(each, Part) and grad is not None else grad
        for each, grad in pairs
    )


def lend(view: Sibling, name: str) -> Part:
    """A view's own part of the `weight` or `bias`: one object as long as somebody has it."""
    lent = view.wide_layer.handed_out
    key = view.conjoin_index, name
    part = lent.get(key)
    if part is None or part.conjoin_view is not view or part.conjoin_whole is not part.whole():
        part = lent[key] = Part.of(view, name)
    return part.bound()


def unshared(value: Any) -> Any:
    """A value that is to be kept in a module: of a part, the Parameter of a plain layer."""
    return value._alone() if isinstance(value, Part) else value


def _registered(module: nn.Module, name: str, value: Any) -> Any:
    return unshared(value)


nn.modules.module.register_module_parameter_registration_hook(_registered)
