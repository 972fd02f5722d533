"""verify: are two models the same function?

Copies of both are converted to float64, where rounding cannot be taken for a difference, and run
side by side from the same seeds in every setting of `SETTINGS`. After each call and its backward
pass, all that it left behind is compared, in this order:

    what it raised, outputs, inputs, gradients, parameters, buffers, attributes, random streams
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from conjoin import outcome
from conjoin.api import check_model, example_calls
from conjoin.outcome import Key, Pieces, is_inexact, tensors_in, tolerance_of
from conjoin.programs.verifying import left_behind
from conjoin.tracing.observe import Call, unfit
from conjoin.tracing.undisturbed import start_streams, undisturbed

ROUNDING_UNITS = 10
"""The room for a less precise dtype inside a converted model. Its wide layers run in float64, so
all that can differ is to which side a number is rounded: by one unit, and some more further on."""

SEED = 20


@dataclass(frozen=True)
class Difference:
    """The first difference between two models.

    Attributes:
        where: the mode that the models were in; empty where nothing was run.
        call: the number of the call, from 1; 0 where nothing was run.
        what: what differs, such as `gradient of encoder.mean.weight`.
        how: in which way.
    """

    where: str
    call: int
    what: str
    how: str

    def __str__(self) -> str:
        place = f"in {self.where}, call {self.call}, " if self.call else ""
        return f"{place}{self.what}: {self.how}"


@dataclass(frozen=True)
class Verification:
    """What `verify` found; true where the models are equal, and `str()` of it tells the story.

    Attributes:
        difference: the first difference, or None.
        calls: how many calls there were in each mode.
        modes: the modes in which the models ran.
        converted: whether they ran in float64. If not, they did not run there, and ran as they are.
        dtype: the least precise dtype in which the original computed something.
        outputs: the number of tensors in the outputs.
        gradients: the number of parameters and inputs with a gradient.
        buffers: the number of buffers.
        raised: how many of the calls, over all modes, raised an error, the same in both.
        largest: the largest difference between two numbers.
    """

    difference: Difference | None
    calls: int
    modes: tuple[str, ...] = ()
    converted: bool = True
    dtype: torch.dtype = torch.float64
    outputs: int = 0
    gradients: int = 0
    buffers: int = 0
    raised: int = 0
    largest: float = 0.0

    def __bool__(self) -> bool:
        return self.difference is None

    def __str__(self) -> str:
        if self.difference is not None:
            return (
                f"different: {self.difference}{self._precision() if self.difference.call else ''}"
            )
        raised = f"; {_several(self.raised, 'call')} raised the same error" if self.raised else ""
        modes = "training and evaluation mode, with and without gradients"
        if self.modes == (EXPORTED.where,):
            modes = EXPORTED.where
        return (
            f"equal: {_several(self.calls, 'call')} in {modes}{self._precision()}\n"
            f"compared: {_several(self.outputs, 'output')}, "
            f"{_several(self.gradients, 'gradient')}, {_several(self.buffers, 'buffer')} and the "
            f"random stream; largest difference {self.largest:.1e}{raised}"
        )

    def _precision(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        if self.modes == (EXPORTED.where,):
            return f", in {dtype}"
        if not self.converted:
            return f", in {dtype}, for the model does not run in float64"
        inside = f", with {dtype} inside" if self.dtype is not torch.float64 else ""
        return f", in float64{inside}"


def verify(
    original: nn.Module | ExportedProgram,
    optimized: nn.Module | ExportedProgram,
    example_inputs: tuple[Any, ...] | list[tuple[Any, ...]] | None = None,
    *,
    example_kwargs: dict[str, Any] | None = None,
) -> Verification:
    """Runs two models side by side, and tells the first difference.

    Copies of both run in float64, in training and in evaluation mode, with and without gradients,
    from the same seeds. Compared are the outputs (types, shapes, dtypes, `requires_grad`, values),
    errors, what the inputs are afterwards, the gradients of the inputs and of every parameter under
    its original name, parameters, buffers, plain attributes and the random streams. The models, the
    inputs and the random streams stay as they are. Models that do not run in float64 run as they
    are, and the tolerance is that of their own dtype.

    A gradient of zeros where the original has none is no difference for a parameter that is part of
    a wide layer, since one wide weight has one gradient.

    Two exported programs run once, in the mode and the types that are written in their graphs, on
    each of the calls by itself.

    Args:
        original: the model as it was, or an exported program.
        optimized: the model that should be the same function, such as `optimize(original, ...)`.
        example_inputs: the positional arguments of a call, or a list of such tuples. Several calls
            run one after another, so that buffers carry on. For exported programs by default those
            that the original was exported with.
        example_kwargs: the keyword arguments that go with them.

    Returns:
        The verification: true where the models are equal.

    Raises:
        TypeError: one of the models is no module, or one only is an exported program, or
            `example_inputs` is no tuple or list of tuples.
        ValueError: there is no example input, a model or input cannot be copied or is on the meta
            device, or the models do not run on the example inputs in any mode.

    Example:
        >>> import torch, conjoin
        >>> model = conjoin.nn.Parallel(torch.nn.Linear(8, 2), torch.nn.Linear(8, 3))
        >>> x = torch.randn(4, 8)
        >>> result = conjoin.verify(model, conjoin.optimize(model, (x,)), (x,))
        >>> bool(result), result.outputs, result.gradients
        (True, 2, 5)
    """
    calls = example_calls(example_inputs, example_kwargs)
    if isinstance(original, ExportedProgram) and isinstance(optimized, ExportedProgram):
        return _programs(original, optimized, calls)
    if isinstance(original, ExportedProgram) or isinstance(optimized, ExportedProgram):
        raise TypeError(
            "an exported program is compared with another one: export the other model too."
        )
    check_model(original)
    check_model(optimized)
    _check_calls(calls)
    if any(_all_on_meta(model) for model in (original, optimized)):
        raise ValueError(
            "a model on the meta device has no values to compare: load its weights first, with "
            "to_empty and load_state_dict."
        )
    unlike = outcome.unlike_weights(optimized, original)
    if unlike is not None:
        what = "the two models hold different weights"
        return Verification(Difference("", 0, what, " ".join(unlike)), len(calls))
    with undisturbed(), torch.inference_mode(False), torch.enable_grad():
        found = _compare(original, optimized, calls, convert=True)
        if found.raised:
            plain = _compare(original, optimized, calls, convert=False)
            found = plain if found.raised - plain.raised else found
    if found.failure is not None and len(found.raised) == found.ran and found.difference is None:
        raise ValueError(unfit(found.failure)) from found.failure
    return found.result(len(calls))


def _check_calls(calls: Sequence[Call]) -> None:
    if not calls:
        raise ValueError(
            "there is nothing to run the models on: pass a tuple of the arguments that the model "
            "is called with as example_inputs."
        )


def _several(count: int, name: str) -> str:
    return f"{count} {name}{'' if count == 1 else 's'}"


def _all_on_meta(model: nn.Module) -> bool:
    parameters = list(model.parameters())
    return bool(parameters) and all(parameter.is_meta for parameter in parameters)


def _programs(
    original: ExportedProgram, optimized: ExportedProgram, calls: Sequence[Call]
) -> Verification:
    """Runs two exported programs side by side."""
    calls = calls or [original.example_inputs or ((), {})]
    found = _Comparison(False, (EXPORTED,))
    with undisturbed(), torch.inference_mode(False), torch.enable_grad():
        for number, call in enumerate(calls):
            watch = _Watch()
            with watch:
                expected, failure = left_behind(original, call, _backward, SEED + number)
            actual, _ = left_behind(optimized, call, _backward, SEED + number)
            found.dtype = max(found.dtype, watch.dtype, key=tolerance_of)
            found.add(EXPORTED, number, expected, failure)
            unlike, largest = outcome.first_unlike(actual, expected, found.tolerance())
            found.largest = max(found.largest, largest)
            if unlike is not None:
                found.difference = Difference(EXPORTED.where, number + 1, *unlike)
                break
    if found.failure is not None and len(found.raised) == found.ran and found.difference is None:
        raise ValueError(unfit(found.failure)) from found.failure
    return found.result(len(calls))


# Running


@dataclass(frozen=True)
class Setting:
    """How the models are run.

    Attributes:
        where: what it is called.
        training: the mode; None leaves every module in the mode that it is in.
        differentiable: whether the floating inputs require a gradient, whatever they were given as.
        gradients: whether there is a backward pass; if not, they run without gradients.
    """

    where: str
    training: bool | None
    differentiable: bool = False
    gradients: bool = True


SETTINGS = (
    Setting("training mode", training=True),
    Setting("training mode with inputs that require gradients", True, differentiable=True),
    Setting("evaluation mode with inputs that require gradients", False, differentiable=True),
    Setting("evaluation mode without gradients", False, gradients=False),
)
"""Training as it is done, evaluation as it is done, and both with the gradients of the inputs."""

EXPORTED = Setting("the mode that it was exported in", None)

MIXED = Setting("the mode that each module is in", None)


def _settings(model: nn.Module) -> tuple[Setting, ...]:
    mixed = len({module.training for module in model.modules()}) > 1
    return (*SETTINGS, MIXED) if mixed else SETTINGS


@dataclass
class _Comparison:
    """What was found so far."""

    converted: bool
    settings: tuple[Setting, ...]
    dtype: torch.dtype = torch.float64
    difference: Difference | None = None
    failure: Exception | None = None
    ran: int = 0
    raised: set[tuple[str, int]] = dataclasses.field(default_factory=set)
    largest: float = 0.0
    compared: set[Key] = dataclasses.field(default_factory=set)

    def add(self, setting: Setting, number: int, left: Pieces, failure: Exception | None) -> None:
        """Notes what a call of the original left behind."""
        self.ran += 1
        self.compared |= {key for key, piece in left.items() if piece.values is not None}
        if failure is not None:
            self.failure = self.failure or failure
            self.raised.add((setting.where, number))

    def tolerance(self) -> float:
        """The relative difference that is allowed."""
        tolerance = tolerance_of(self.dtype)
        if not self.converted:
            return tolerance
        rounding = ROUNDING_UNITS * torch.finfo(self.dtype).eps
        return max(tolerance_of(torch.float64), min(tolerance, rounding))

    def result(self, calls: int) -> Verification:
        """What the user gets."""
        kinds = [kind for kind, _ in self.compared]
        return Verification(
            difference=self.difference,
            calls=calls,
            modes=tuple(setting.where for setting in self.settings),
            converted=self.converted,
            dtype=self.dtype,
            outputs=kinds.count("output"),
            gradients=kinds.count("gradient"),
            buffers=kinds.count("buffer"),
            raised=len(self.raised),
            largest=self.largest,
        )


def _compare(
    original: nn.Module, optimized: nn.Module, calls: Sequence[Call], *, convert: bool
) -> _Comparison:
    """Runs both models up to the first difference."""
    found = _Comparison(convert, _settings(original))
    lifted = _liftable(original)
    for setting in found.settings:
        watch = _Watch()
        theirs = _run(original, calls, setting, convert, watch)
        ours = _run(optimized, calls, setting, convert, contextlib.nullcontext())
        found.dtype = max(found.dtype, watch.dtype, key=tolerance_of)
        for number, ((expected, failure), (actual, _)) in enumerate(zip(theirs, ours, strict=True)):
            expected, actual = (_without(lifted, each) for each in (expected, actual))
            found.add(setting, number, expected, failure)
            unlike, largest = outcome.first_unlike(actual, expected, found.tolerance())
            found.largest = max(found.largest, largest)
            if unlike is not None:
                found.difference = Difference(setting.where, number + 1, *unlike)
                return found
    return found


def _liftable(original: nn.Module) -> tuple[str, ...]:
    """What the attributes begin with of modules in graphs that only hold tensors.

    In the optimized model a layer may stand there, which has settings.
    """
    return tuple(
        f"attribute {path}."
        for path, module in original.named_modules()
        if type(module) is nn.Module and not module._modules
    )


def _without(names: tuple[str, ...], pieces: Pieces) -> Pieces:
    """The pieces but for attributes that begin with one of these names."""
    if not names:
        return pieces
    return {
        (kind, name): piece
        for (kind, name), piece in pieces.items()
        if kind != "attribute" or not name.startswith(names)
    }


_Left = tuple[Pieces, "Exception | None"]
"""What a call leaves behind, and what it raised."""


def _run(
    model: nn.Module,
    calls: Sequence[Call],
    setting: Setting,
    convert: bool,
    watch: contextlib.AbstractContextManager[object],
) -> list[_Left]:
    """The calls, one after another, of a copy of the model."""
    copied = _prepared(model, setting, convert)
    # What the code keeps in globals and on classes is put back, so that both find the same there.
    with undisturbed(copied):
        if convert:  # What the code makes without naming a dtype goes with its weights.
            torch.set_default_dtype(_exact(torch.get_default_dtype()))
        inputs = [_arguments(call, setting, convert) for call in calls]
        return [
            _play(copied, call, leaves, setting.gradients, SEED + number, watch)
            for number, (call, leaves) in enumerate(inputs)
        ]


def _play(
    model: nn.Module,
    call: Call,
    leaves: Mapping[str, Tensor],
    gradients: bool,
    seed: int,
    watch: contextlib.AbstractContextManager[object],
) -> _Left:
    """One call and, with `gradients`, its backward pass."""
    for parameter in model.parameters():
        parameter.grad = None
    args, kwargs = call
    start_streams(seed)
    with torch.set_grad_enabled(gradients), watch:
        output, failure = _attempt(lambda: model(*args, **kwargs))
        grad_mode = outcome.piece_of(torch.is_grad_enabled())
    left: Pieces = {("error", "the forward pass"): outcome.raised(failure, message=True)}
    if failure is None:
        left |= outcome.described("output", "output", output)
    for arguments in (args, kwargs):
        left |= outcome.described("input", "input", arguments)
    if failure is None and gradients:
        with watch:
            _, failure = _attempt(lambda: _backward(output))
        # Its message may name operations of the graph, and those of a wide layer are others.
        left["error", "the backward pass"] = outcome.raised(failure, message=False)
        if failure is None:
            left |= outcome.gradients(model, leaves)
    left |= outcome.state(model) | outcome.streams()
    left["mode", "the grad mode afterwards"] = grad_mode
    return left, failure


def _attempt(run: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return run(), None
    except Exception as error:  # noqa: BLE001 - The model's own code, which may raise anything.
        return None, error


def _backward(output: object) -> None:
    """The backward pass from all outputs that train, with gradients that are random but fixed."""
    generator = torch.Generator().manual_seed(SEED)
    roots = [t for t in tensors_in(output) if t.requires_grad]
    roots = [t if t.layout is torch.strided else t.to_dense() for t in roots]
    gradients = [
        torch.randn(t.shape, generator=generator, dtype=_exact(t.dtype)).to(t) for t in roots
    ]
    if roots:
        torch.autograd.backward(roots, gradients)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the least precise dtype in which something is computed."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = torch.float64

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.dtype = max(self.dtype, leaf.dtype, key=tolerance_of)
        return result


# Copies


def _prepared(model: nn.Module, setting: Setting, convert: bool) -> nn.Module:
    """A copy of a model, in its mode."""
    held = [[m._parameters, m._buffers, outcome.attributes(m)] for m in model.modules()]
    prepared = _copied(model, _converted(tensors_in(held), convert), "the model")
    return prepared if setting.training is None else prepared.train(setting.training)


def _arguments(call: Call, setting: Setting, convert: bool) -> tuple[Call, dict[str, Tensor]]:
    """A copy of the arguments, and the tensors that collect the gradients of the inputs by name.

    Where the setting makes an input differentiable, the model gets no leaf, so that it may change
    its input in place.
    """
    named = {
        id(value): (name, value)
        for arguments in call
        for name, value in outcome.walk("input", arguments)
        if isinstance(value, Tensor)
    }
    memo = _converted([value for _, value in named.values()], convert)
    leaves = {}
    for key, (name, _) in named.items():
        leaf = memo.get(key)
        if leaf is None:
            continue
        if setting.differentiable:
            memo[key] = leaf.requires_grad_().clone()
        if leaf.requires_grad:
            leaves[name] = leaf
    return _copied(call, memo, "an example input"), leaves


_Copied = TypeVar("_Copied")


def _copied(value: _Copied, memo: dict[int, Any], what: str) -> _Copied:
    try:
        return copy.deepcopy(value, memo)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ValueError(
            f"{what} cannot be copied ({error}), and verify runs copies to leave the models as "
            "they are."
        ) from error


def _converted(tensors: Iterable[Tensor], convert: bool) -> dict[int, Tensor]:
    """For `copy.deepcopy`: what stands for each of the floating tensors, by its id.

    Tensors that share memory, which `deepcopy` would part if they are parameters, share it still.
    """
    memory: dict[tuple[int, torch.dtype], Tensor] = {}
    memo: dict[int, Tensor] = {}
    for tensor in tensors:
        if not _convertible(tensor):
            continue
        dtype = _exact(tensor.dtype) if convert else tensor.dtype
        storage = tensor.untyped_storage()
        key = storage._cdata, tensor.dtype
        if key not in memory:
            size = storage.nbytes() // tensor.element_size()
            memory[key] = tensor.detach().as_strided((size,), (1,), 0).to(dtype, copy=True)
        strides = tensor.stride(), tensor.storage_offset()
        made = memory[key].as_strided(tensor.shape, *strides).data
        parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = (
            nn.Parameter(made, tensor.requires_grad)
            if parameter
            else made.requires_grad_(tensor.requires_grad)
        )
    return memo


def _convertible(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and type(tensor.data) is Tensor
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and is_inexact(tensor.dtype)
        and not tensor.is_conj()
    )


def _exact(dtype: torch.dtype) -> torch.dtype:
    """Complex or real, with as many digits as there are."""
    return torch.complex128 if dtype.is_complex else torch.float64
