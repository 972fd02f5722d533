"""Whether exported programs are alike: the same function, the same to the bit, to and fro."""

import copy
import io

import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export
from torch.utils import _pytree as pytree

import conjoin


def file_of(program: ExportedProgram) -> ExportedProgram:
    """The program after having been saved and loaded."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer)


def exported(model: nn.Module, *args: torch.Tensor, dynamic: bool = True, **options: object):
    shapes = pytree.tree_map(lambda arg: {0: Dim.DYNAMIC} if arg.dim() and dynamic else None, args)
    return export(model, args, dynamic_shapes=shapes, **options)


def run(program: ExportedProgram, *args: torch.Tensor) -> tuple[list[torch.Tensor], dict]:
    """What a program gives and what its buffers are then, by their original names."""
    module = copy.deepcopy(program).module()
    torch.manual_seed(0)  # For Dropout.
    outputs = pytree.tree_leaves(module(*copy.deepcopy(args)))
    return outputs, dict(module.named_buffers())


def assert_same(program: ExportedProgram, other: ExportedProgram) -> None:
    """The same program to the bit, all that is known of its nodes included."""
    assert str(other) == str(program)
    assert list(other.state_dict) == list(program.state_dict)
    for name, tensor in program.state_dict.items():
        found = other.state_dict[name]
        assert type(found) is type(tensor)
        assert torch.equal(found, tensor)
        assert (found.stride(), found.requires_grad) == (tensor.stride(), tensor.requires_grad)
    for node, found in zip(program.graph.nodes, other.graph.nodes, strict=True):
        for key in ("stack_trace", "nn_module_stack", "torch_fn", "custom"):
            assert found.meta.get(key) == node.meta.get(key), (node, key)
        assert str(found.meta.get("val")) == str(node.meta.get("val"))
    assert other.range_constraints == program.range_constraints


def assert_close(found: object, expected: object) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def assert_to_and_fro(program: ExportedProgram, fused: ExportedProgram, inputs: list) -> None:
    """The same function for each batch, in a file too, and the very program comes back."""
    for args in inputs:
        outputs, buffers = run(program, *args)
        found, wide = run(fused, *args)
        assert_close(found, outputs)
        assert [t.stride() for t in found] == [t.stride() for t in outputs]
        plain = {n: t for n, t in wide.items() if n in buffers}
        assert_close(plain, {n: buffers[n] for n in plain})
    assert bool(conjoin.verify(program, fused, inputs))
    loaded = file_of(fused)
    assert_close(run(loaded, *inputs[1])[0], run(program, *inputs[1])[0])
    assert_same(program, conjoin.unfuse(fused))
    # A file has nodes also for what an operation gives that nothing reads.
    assert_same(file_of(program), file_of(conjoin.unfuse(loaded)))


class Unmoded(nn.Module):
    """A program's module, which may not be told a mode."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        self.run = [program.module()]

    def forward(self, *args: torch.Tensor) -> object:
        return self.run[0](*args)
