"""Ways to call siblings: in any order, in modes, with changes in between."""

import contextlib

import torch
from families import Family
from torch.utils.checkpoint import checkpoint


class Calls(Family):
    """Siblings a, b, c that are called as a function says."""

    def __init__(self, family, script):
        super().__init__(list(family.layers))
        self.script = script

    def forward(self, x):
        return self.script(x, *self.layers)


def between(change):
    def script(x, a, b, c):
        x = x * 1
        first = a(x)
        change(x)
        return first, b(x), c(x)

    return script


def under(*modes):
    def script(x, *layers):
        outputs = []
        for mode, layer in zip(modes, layers, strict=True):
            with mode():
                outputs.append(layer(x))
        return outputs

    return script


def frozen_input(x, a, b, c):
    with torch.inference_mode():
        x = x.detach().clone()
        return a(x).clone(), b(x).clone(), c(x).clone()


def changed_parts(x, a, b, c):
    return a(x).mul_(2), torch.relu_(b(x)), c(x).add_(1).tanh_()


def changed_view_of_part(x, a, b, c):
    first = a(x)
    first[0] = 0
    return first, b(x), c(x).transpose(0, 1).exp_()


def recomputed(x, a, b, c, **settings):
    return checkpoint(lambda x: (a(x).sin(), b(x).cos(), c(x).tanh()), x, **settings)


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


SCRIPTS = {
    "in order": lambda x, a, b, c: (a(x), b(x), c(x)),
    "backwards": lambda x, a, b, c: (c(x), b(x), a(x)),
    "twice": lambda x, a, b, c: (a(x), a(x), b(x), b(x), c(x), a(x)),
    "interleaved": lambda x, a, b, c: [f(y) for f in (a, b, c) for y in (x, x + 1, x)],
    "equal inputs": lambda x, a, b, c: (a(x), b(x.clone()), c(x + 0)),
    "aliases": lambda x, a, b, c: (a(x), b(x.view_as(x)), c(x.detach())),
    "one left out": lambda x, a, b, c: (a(x), c(x)),
    "one chained": lambda x, a, b, c: (a(x), b(x), c(a(x).tanh() @ b(x).tanh().mT @ x)),
    "keyword": lambda x, a, b, c: (a(input=x), b(x), c(input=x)),
    "gradients off": under(torch.no_grad, torch.enable_grad, torch.no_grad),
    "gradients off later": under(torch.enable_grad, torch.no_grad, torch.enable_grad),
    "inference mode": under(contextlib.nullcontext, torch.no_grad, contextlib.nullcontext),
    "inference input": frozen_input,
    "parts changed": changed_parts,
    "views of parts changed": changed_view_of_part,
    "checkpoint": lambda *args: recomputed(*args, use_reentrant=False),
    "reentrant checkpoint": lambda *args: recomputed(*args, use_reentrant=True),
    "detached": lambda x, a, b, c: (a(x).detach(), b(x), c(x.detach())),
}
INPUT_CHANGES = {
    "itself": lambda x: x.mul_(2),
    "a view": lambda x: x[0].add_(1),
    "a function": torch.relu_,
    "out": lambda x: torch.add(x, 1, out=x),
    "an element": lambda x: x.__setitem__(0, 7.0),
}
SAME_INPUT = ["in order", "backwards", "parts changed", "views of parts changed"]
