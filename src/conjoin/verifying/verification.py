"""`Verification` and `Difference`: what `verify` found, and how it is told."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from conjoin.verifying.settings import EXPORTED


@dataclass(frozen=True)
class Difference:
    """The first difference between two models.

    Attributes:
        where: the mode that the models were in; empty where nothing was run.
        call: the number of the call, from 1; 0 where nothing was run.
        what: what differs, such as `gradient of encoder.mean.weight`.
        how: in which way.

    Example:
        >>> import torch, conjoin
        >>> x = torch.ones(2)
        >>> result = conjoin.verify(torch.nn.ReLU(), torch.nn.Softplus(), (x,))
        >>> result.difference.where, result.difference.call, result.difference.what
        ('training mode', 1, 'output')
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

    Example:
        >>> import torch, conjoin
        >>> result = conjoin.verify(torch.nn.ReLU(), torch.nn.ReLU(), (torch.ones(2),))
        >>> bool(result), result.outputs, result.largest, result.difference
        (True, 1, 0.0, None)
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


def _several(count: int, name: str) -> str:
    return f"{count} {name}{'' if count == 1 else 's'}"
