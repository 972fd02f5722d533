"""Products with raw Parameters that read one tensor become one product."""

import pytest
import torch
from counting import count
from equivalence import assert_close, assert_equivalent, assert_same_state, assert_same_structure
from products import MODELS, build, normal, optimized
from torch import nn
from torch.nn import functional as F

import conjoin
from conjoin.layers.wide import Wide
from conjoin.legality import Reason
from conjoin.tracing import regions

every_model = pytest.mark.parametrize("name", MODELS)


@every_model
@pytest.mark.parametrize("training", [True, False])
def test_products_run_at_once(name, training):
    model, inputs, fused = optimized(name)
    before, after = MODELS[name][2:]
    assert count(model, inputs, training=training).products == before
    assert count(fused, inputs, training=training).products == after


@every_model
def test_is_the_same_function(name):
    model, inputs, fused = optimized(name)
    assert_equivalent(fused, model, inputs)
    assert conjoin.verify(model, fused, inputs)


@every_model
def test_trains_alike(name):
    """Three steps of Adam, and evaluation after each."""
    model, inputs, fused = optimized(name)
    optimizers = [torch.optim.Adam(each.parameters(), lr=0.1) for each in (model, fused)]
    for _ in range(3):
        outputs = []
        for trained, optimizer in zip((model, fused), optimizers, strict=True):
            torch.manual_seed(0)
            output = trained.train()(*inputs)
            loss = sum(
                o.square().sum()
                for o in (output if isinstance(output, (list, tuple)) else [output])
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            outputs.append(trained.eval()(*inputs))
        torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
    assert_close(fused.state_dict(), model.state_dict())


@every_model
def test_unfuse_gives_back_the_original(name):
    model, _, fused = optimized(name)
    plain = conjoin.unfuse(fused)
    assert_same_state(plain, model)
    assert_same_structure(plain, model)
    assert [type(m) for m in plain.modules()] == [type(m) for m in model.modules()]
    assert [vars(m).keys() for m in plain.modules()] == [vars(m).keys() for m in model.modules()]


@every_model
def test_report_lists_the_group(name):
    model, inputs, fused = optimized(name)
    report = conjoin.report(model, inputs)
    names = {name for group in report.groups if group.fused for name in group.layers}
    raw = {name for name, _ in model.named_parameters()} & names
    assert raw
    again = conjoin.report(fused, inputs)
    assert [(g.kind, g.layers, g.fused, g.launches) for g in again.groups] == [
        (g.kind, g.layers, g.fused, g.launches) for g in report.groups
    ]
    before, after = (sum(g.launches[i] for g in report.groups) for i in (0, 1))
    assert before - after <= report.launches.before.forward - report.launches.after.forward


class Pair(nn.Module):
    """Two weights that are read as a subclass says."""

    def __init__(self, a=(6, 4), b=(6, 4)):
        super().__init__()
        self.a, self.b = normal(*a), normal(*b)
        self.double()

    def forward(self, x):
        return x @ self.a, x @ self.b


def pair(forward, **settings):
    """A model of two weights with this forward."""
    cls = type("Own", (Pair,), {"forward": forward, "__module__": __name__})
    return cls(**settings)


X = torch.randn(5, 6, dtype=torch.float64)
FORWARDS = {
    "matmul": lambda self, x: (torch.matmul(x, self.a), torch.matmul(x, self.b)),
    "method": lambda self, x: (x.matmul(self.a), x.matmul(self.b)),
    "mm": lambda self, x: (torch.mm(x, self.a), x.mm(self.b)),
    "mixed": lambda self, x: (x @ self.a, torch.matmul(x, self.b)),
    "tensordot": lambda self, x: (
        torch.tensordot(x, self.a, dims=([-1], [0])),
        torch.tensordot(x, self.b, dims=[[-1], [0]]),
    ),
    "tensordot of one": lambda self, x: (
        torch.tensordot(x, self.a, 1),
        torch.tensordot(x, self.b, 1),
    ),
    "einsum": lambda self, x: (
        torch.einsum("bi,io->bo", x, self.a),
        torch.einsum("bi, io -> bo", [x, self.b]),
    ),
    "again": lambda self, x: (x @ self.a, x @ self.b, (x + 1) @ self.a, (x + 1) @ self.b),
    "in place": lambda self, x: ((x @ self.a).add_(1), (x @ self.b).mul_(2).relu_()),
    "views": lambda self, x: ((x @ self.a).view(-1, 2, 2), (x @ self.b).t().contiguous()),
    "no grad": lambda self, x: _without_gradients(self, x),
}


def _without_gradients(self, x):
    with torch.no_grad():
        return x @ self.a, x @ self.b


def is_fused(model):
    return any(isinstance(module, Wide) for module in model.modules())


@pytest.mark.parametrize("name", FORWARDS)
def test_ways_to_write_a_product(name):
    model = pair(FORWARDS[name])
    fused = conjoin.optimize(model, (X,))
    assert is_fused(fused)
    assert count(fused, (X,)).products == count(model, (X,)).products / 2
    assert_equivalent(fused, model, (X,))


ROWS, IMAGES, ROW_IMAGES = (
    torch.randn(shape, dtype=torch.float64) for shape in [(5, 6), (2, 3, 5, 6), (2, 3, 7)]
)
WITH_BIAS = {
    "linear": lambda self, x: (F.linear(x, self.a, self.c) + 1, F.linear(x, self.b, self.d) + 1),
    "addmm": lambda self, x: (
        torch.addmm(self.c, x, self.a.t()) + 1,
        torch.addmm(self.d, x, self.b.t()) + 1,
    ),
}
ROWS_FIRST = {
    "t": lambda self, x: (x @ self.a.t() + 1, x.matmul(torch.t(self.b)) + 1),
    "T": lambda self, x: (x @ self.a.T + 1, torch.matmul(x, self.b.mT) + 1),
    "mm": lambda self, x: (
        torch.mm(x, self.a.transpose(0, 1)) + 1,
        x.mm(self.b.permute(1, 0)) + 1,
    ),
    "einsum": lambda self, x: (
        torch.einsum("bi,oi->bo", x, self.a) + 1,
        torch.einsum("bi,oi->bo", x, self.b) + 1,
    ),
    "dots": lambda self, x: (
        torch.einsum("...i,oi->...o", x, self.a) + 1,
        torch.einsum("...i,oi->...o", x, self.b) + 1,
    ),
    "viewed": lambda self, x: ((x @ self.a.t()).view(-1), x @ self.b.t()),
}
"""Products with weights (out, in)."""

CONVOLUTIONS = {
    "plain": (
        ROW_IMAGES,
        lambda self, x: (F.conv1d(x, self.a), F.conv1d(x, self.b)),
        (4, 3, 2),
        (2, 3, 2),
    ),
    "settings": (
        IMAGES,
        lambda self, x: (
            F.conv2d(x, self.a, None, 2, (1, 0), dilation=1),
            F.conv2d(x, self.b, stride=[2, 2], padding=(1, 0)),
        ),
        (4, 3, 2, 3),
        (1, 3, 2, 3),
    ),
    "same": (
        IMAGES,
        lambda self, x: (
            F.conv2d(x, self.a, padding="same"),
            F.conv2d(x, self.b, padding="same"),
        ),
        (4, 3, 3, 1),
        (1, 3, 3, 1),
    ),
    "viewed": (
        IMAGES,
        lambda self, x: (F.conv2d(x, self.a).view(-1), F.conv2d(x, self.b)),
        (4, 3, 2, 2),
        (2, 3, 2, 2),
    ),
    "3d": (
        IMAGES[None],
        lambda self, x: (F.conv3d(x, self.a), F.conv3d(x, self.b)),
        (4, 2, 2, 2, 2),
        (3, 2, 2, 2, 2),
    ),
    "transposed": (
        IMAGES,
        lambda self, x: (
            F.conv_transpose2d(x, self.a, None, 2, 0, 1),
            F.conv_transpose2d(x, self.b, None, 2, output_padding=1),
        ),
        (3, 4, 2, 2),
        (3, 2, 2, 2),
    ),
    "transposed 1d": (
        ROW_IMAGES,
        lambda self, x: (F.conv_transpose1d(x, self.a), F.conv_transpose1d(x, self.b)),
        (3, 4, 2),
        (3, 2, 2),
    ),
}


def assert_one_product(model, x):
    """One product of two, the same function, and the way back."""
    fused = conjoin.optimize(model, (x,))
    assert is_fused(fused)
    assert count(model, (x,)).products == 2 * count(fused, (x,)).products == 2
    assert_equivalent(fused, model, (x,))
    assert conjoin.verify(model, fused, (x,))
    (group,) = conjoin.report(model, (x,)).groups
    assert (group.layers, group.fused) == (("a", "b"), True)
    plain = conjoin.unfuse(fused)
    assert_same_state(plain, model)
    assert_same_structure(plain, model)
    return fused


@pytest.mark.parametrize("name", ROWS_FIRST)
def test_weights_with_a_row_for_each_output(name):
    widths = (4, 4) if name == "viewed" else (4, 3)  # What is viewed is one of a stack.
    model = pair(ROWS_FIRST[name], a=(widths[0], 6), b=(widths[1], 6))
    fused = assert_one_product(model, ROWS)
    assert_same_outcomes(fused, model, WRONG)


class Quartet(Pair):
    """Two weights and two biases that are read as a subclass says."""

    def __init__(self, *shapes):
        nn.Module.__init__(self)
        self.a, self.b, self.c, self.d = (normal(*shape) for shape in shapes)
        self.double()


@pytest.mark.parametrize("name", WITH_BIAS)
def test_products_with_a_bias(name):
    class Own(Quartet):
        forward = WITH_BIAS[name]

    assert_one_product(Own((4, 6), (3, 6), (4,), (3,)), ROWS)


def test_addmm():
    class Own(Quartet):
        def forward(self, x):
            return torch.addmm(self.c, x, self.a), torch.addmm(self.d, x, self.b)

    model = Own((6, 4), (6, 4), (4,), (4,))
    fused = assert_one_product(model, ROWS)
    assert_same_outcomes(fused, model, WRONG)


def test_addmm_with_a_bias_that_is_broadcast():
    class Own(Quartet):
        def forward(self, x):
            return torch.addmm(self.c, x, self.a), torch.addmm(self.d, x, self.b)

    model = Own((6, 4), (6, 4), (1,), (1,))
    fused = conjoin.optimize(model, (ROWS,))
    assert not is_fused(fused)
    assert_equivalent(fused, model, (ROWS,))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    x, forward, a, b = CONVOLUTIONS[name]
    model = pair(forward, a=a, b=b)
    fused = assert_one_product(model, x)
    wrong = x[:, :2], x[0], x[0, 0], x.float(), x[..., :1], x[:0]
    assert_same_outcomes(fused, model, dict(enumerate(wrong)))


def test_convolutions_go_on_together():
    class Own(Quartet):
        def forward(self, x):
            first = F.conv2d(x, self.a, self.c, padding=1).relu()
            second = F.conv2d(x, self.b, self.d, padding=1).relu()
            return F.max_pool2d(first, 2) + 1, F.max_pool2d(second, 2) + 1

    model = Own((4, 3, 3, 3), (2, 3, 3, 3), (4,), (2,))
    fused = conjoin.optimize(model, (IMAGES,))
    counts = count(fused, (IMAGES,))
    assert (counts.convolutions, counts.activations, counts.pools) == (1, 1, 1)
    assert_equivalent(fused, model, (IMAGES,))


class Turned(Pair):
    def forward(self, x):
        return (x @ self.a.t()).add_(1), (x @ self.b.t()).mul_(2).relu_()


class Filtered(Pair):
    def forward(self, x):
        return F.conv2d(x, self.a).add_(1), F.conv2d(x, self.b).mul_(2).relu_()


class Painted(Pair):
    def forward(self, x):
        return F.conv_transpose2d(x, self.a).add_(1), F.conv_transpose2d(x, self.b).mul_(2).relu_()


class Added(Quartet):
    def forward(self, x):
        first = torch.addmm(self.c, x, self.a).add_(1)
        return first, torch.addmm(self.d, x, self.b).mul_(2).relu_()


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (lambda: Turned((4, 6), (4, 6)), ROWS),
        (lambda: Filtered((4, 3, 2, 2), (4, 3, 2, 2)), IMAGES),
        (lambda: Painted((3, 4, 2, 2), (3, 4, 2, 2)), IMAGES),
        (lambda: Added((6, 4), (6, 4), (4,), (4,)), ROWS),
    ],
    ids=["turned", "convolution", "transposed", "addmm"],
)
def test_what_is_changed_in_place_afterwards(model, x):
    assert_one_product(model(), x)


def test_convolutions_with_other_settings_stay_apart():
    def forward(self, x):
        return F.conv2d(x, self.a), F.conv2d(x, self.b, stride=2)

    model = pair(forward, a=(4, 3, 2, 2), b=(4, 3, 2, 2))
    (group,) = conjoin.report(model, (IMAGES,)).groups
    assert group.reason is Reason.DIFFERENT_SETTINGS
    assert group.kind == "conv2d"
    assert "stride=(2, 2) where a has (1, 1)" in group.detail


OTHERWISE = {
    "its norm": lambda self, x: (x @ self.a, x @ self.b, self.a.norm()),
    "its transpose": lambda self, x: (x @ self.a, x @ self.b, self.b.t()),
    "both ways": lambda self, x: (x @ self.a, x @ self.b, x[:, :4] @ self.b.t()),
    "in another product": lambda self, x: (x @ self.a, x @ self.b, self.b @ x[0, :4]),
    "in a sum": lambda self, x: (x @ self.a, x @ self.b + self.b.sum()),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_parameter_that_is_read_otherwise_stays(name):
    model = pair(OTHERWISE[name])
    assert not is_fused(conjoin.optimize(model, (X,)))
    (group,) = conjoin.report(model, (X,)).groups
    assert (group.fused, group.reason) == (False, Reason.PARAMETERS_READ)
    assert set(group.layers) == {"a", "b"}


UNTOUCHED = {
    "a weight on the left": lambda self, x: (self.a.t() @ x.t(), self.b.t() @ x.t()),
    "a weight that is computed": lambda self, x: (x @ (2 * self.a), x @ (2 * self.b)),
    "another sum": lambda self, x: (
        torch.tensordot(x, self.a, dims=([1], [0])),
        torch.tensordot(x, self.b, dims=([1], [0])),
    ),
    "another equation": lambda self, x: (
        torch.einsum("bi,io->ob", x, self.a),
        torch.einsum("bi,io->ob", x, self.b),
    ),
    "different tensors": lambda self, x: (x @ self.a, (x + 1) @ self.b),
    "where its storage is told": lambda self, x: (
        (x @ self.a).as_strided((2, 2), (1, 1)),
        x @ self.b,
    ),
    "a value decides": lambda self, x: (x @ self.a, x @ self.b) if x.sum() > 0 else (x, x),
}


@pytest.mark.parametrize("name", UNTOUCHED)
def test_what_is_no_plain_product_stays(name):
    model = pair(UNTOUCHED[name])
    fused = conjoin.optimize(model, (X,))
    assert type(fused) is type(model)
    assert not is_fused(fused)
    assert not conjoin.report(model, (X,)).groups
    assert_equivalent(fused, model, (X,))


def mutated(self, x):
    x = x + 0
    first = x @ self.a
    x.mul_(2)
    return first, x @ self.b


def gradients_for_one(self, x):
    with torch.no_grad():
        first = x @ self.a
    return first, x @ self.b


def frozen(model):
    model.a.requires_grad_(False)


PLAIN = Pair.forward
REFUSED = {
    "widths": (PLAIN, {"b": (6, 3)}, None, Reason.DIFFERENT_SETTINGS, "out_features=3"),
    "mutated": (mutated, {}, None, Reason.INPUT_MUTATED, "what a reads has other values"),
    "no grad": (gradients_for_one, {}, None, Reason.CALLED_APART, "with gradients"),
    "calls": (
        lambda self, x: (x @ self.a, x @ self.b, (x + 1) @ self.b),
        {},
        None,
        Reason.CALLED_APART,
        "b: it reads 2 tensors in 2 calls, and a 1 tensor in 1 call",
    ),
    "frozen": (PLAIN, {}, frozen, Reason.DIFFERENT_REQUIRES_GRAD, "requires_grad=True where a"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    forward, shapes, change, reason, detail = REFUSED[name]
    model = pair(forward, **shapes)
    if change is not None:
        change(model)
    fused = conjoin.optimize(model, (X,))
    assert not is_fused(fused)
    (group,) = conjoin.report(model, (X,)).groups
    assert (group.layers, group.fused, group.reason) == (("a", "b"), False, reason)
    assert group.launches == (count(model, (X,)).products,) * 2
    assert detail in group.detail
    with torch.no_grad():
        torch.testing.assert_close(fused(X), model(X))


def hooked(model):
    model.a.register_hook(lambda gradient: gradient)


def sharing_memory(model):
    model.other = nn.Module()
    model.other.a = nn.Parameter(model.a.data)


def tied(model):
    model.other = nn.Module()
    model.other.a = model.a


@pytest.mark.parametrize("change", [hooked, sharing_memory, tied])
def test_what_a_copy_of_the_model_would_not_have(change):
    model = Pair()
    change(model)
    assert not is_fused(conjoin.optimize(model, (X,), inplace=True))


def test_parameters_that_other_code_changes_stay():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = Pair()

        def forward(self, x):
            with torch.no_grad():
                self.pair.a.clamp_(-1, 1)
            return self.pair(x)

    model = Outer()
    assert not is_fused(conjoin.optimize(model, (X,)))
    (group,) = conjoin.report(model, (X,)).groups
    assert group.reason is Reason.PARAMETERS_CHANGED


def test_parameters_that_other_code_lists_stay():
    class Penalized(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = Pair()

        def forward(self, x):
            return *self.pair(x), sum(p.norm() for p in self.parameters())

    model = Penalized()
    fused = conjoin.optimize(model, (X,))
    assert not is_fused(fused)
    assert [group.reason for group in conjoin.report(model, (X,)).groups] == [
        Reason.PARAMETERS_LISTED
    ]
    assert_equivalent(fused, model, (X,))


def test_a_bias_may_be_missing():
    def forward(self, x):
        first = x @ self.a
        return first if self.bias is None else first + self.bias, x @ self.b

    model = pair(forward)
    model.register_parameter("bias", None)
    fused = conjoin.optimize(model, (X,))
    assert is_fused(fused)
    assert_equivalent(fused, model, (X,))
    for each in (model, fused):
        each.bias = nn.Parameter(torch.ones(4, dtype=torch.float64))
    assert_equivalent(fused, model, (X,))


WRONG = {
    "width": torch.randn(3, 4, dtype=torch.float64),
    "that fits by accident": torch.randn(3, 12, dtype=torch.float64),
    "dtype": torch.randn(5, 6),
    "number": torch.tensor(1.0, dtype=torch.float64),
    "rank": torch.randn(2, 5, 6, dtype=torch.float64),
    "one row": torch.randn(6, dtype=torch.float64),
    "no rows": torch.randn(0, 6, dtype=torch.float64),
    "integers": torch.ones(5, 6, dtype=torch.long),
}
LINEAR = {"linear": lambda self, x: (F.linear(x, self.a).view(-1), F.linear(x, self.b))}


@pytest.mark.parametrize("forward", [*FORWARDS, *LINEAR])
def test_other_inputs_give_what_they_gave(forward):
    shapes = {"a": (4, 6), "b": (4, 6)} if forward in LINEAR else {}
    model = pair({**FORWARDS, **LINEAR}[forward], **shapes)
    fused = conjoin.optimize(model, (X,))
    assert is_fused(fused)
    assert_same_outcomes(fused, model, WRONG)


def outcome(model, x):
    """What a model gives, or what it raises."""
    try:
        return [part.detach() for part in model(x)]
    except Exception as error:  # noqa: BLE001 - Whatever PyTorch raises, it is the same.
        return f"{type(error)}: {error}"


def assert_same_outcomes(fused, model, inputs):
    """For each of some inputs the same values, or the same error."""
    for name, x in inputs.items():
        ours, theirs = (outcome(each, x) for each in (fused, model))
        if isinstance(theirs, str):
            assert ours == theirs, name
        else:
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("forward", ["matmul", "mm", "tensordot", "einsum", "linear"])
def test_autocast(forward):
    shapes = {"a": (4, 6), "b": (4, 6)} if forward in LINEAR else {}
    model = pair({**FORWARDS, **LINEAR}[forward], **shapes).float()
    fused = conjoin.optimize(model, (X.float(),))
    assert is_fused(fused)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = [each(X.float()) for each in (model, fused)]
    torch.testing.assert_close(*outputs)


def test_linears_are_one_product_side_by_side():
    """Where nothing depends on the strides, no weight is copied and widths may differ."""

    def forward(self, x):
        return F.linear(x, self.a).relu() + 1, F.linear(x, self.b).relu() + 2

    model = pair(forward, a=(3, 6), b=(5, 6))
    fused = conjoin.optimize(model, (X,))
    (wide,) = fused.parameters()
    assert wide.shape == (8, 6)
    assert_equivalent(fused, model, (X,))


class Returned(Pair):
    def forward(self, x):
        return F.linear(x, self.a), F.linear(x, self.b)


class Viewing(nn.Module):
    """Code that is not traced, and that depends on the strides of what a module returns."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        first, second = self.inner(x)
        return (first.view(-1), second) if x.sum() > 1e9 else (second.view(-1), first)


def test_what_the_model_returns_lies_side_by_side():
    model = Returned((3, 6), (5, 6))
    fused = conjoin.optimize(model, (X,))
    assert [p.shape for p in fused.parameters()] == [(8, 6)]
    assert_equivalent(fused, model, (X,))
    counts = count(fused, (X,))
    assert (counts.matmuls, counts.copies) == (1, 0)


@pytest.mark.parametrize("width", [4, 3])
def test_what_other_code_reads_is_contiguous(width):
    """So it is one of a stack, which has one width for all."""
    model = Viewing(Returned((4, 6), (width, 6)))
    fused = conjoin.optimize(model, (X,))
    assert is_fused(fused) == (width == 4)
    assert_equivalent(fused, model, (X,))


def test_parameters_of_layers_of_pytorch_stay():
    class Borrowed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.MultiheadAttention(6, 2).double() for _ in range(2))

        def forward(self, x):
            return F.linear(x, self.a.in_proj_weight), F.linear(x, self.b.in_proj_weight)

    model = Borrowed()
    fused = conjoin.optimize(model, (X,))
    assert not is_fused(fused)
    assert_equivalent(fused, model, (X,))


@pytest.mark.parametrize("widths", [{}, {"kdim": 4, "vdim": 4}, {"kdim": 4, "vdim": 5}], ids=str)
def test_attention_of_pytorch_stays(widths):
    """Its products are in a function of PyTorch's, which is not looked into."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(6, 2, batch_first=True, **widths).double()
    q = torch.randn(3, 4, 6, dtype=torch.float64)
    k, v = (
        torch.randn(3, 5, widths.get(name, 6), dtype=torch.float64) for name in ("kdim", "vdim")
    )
    v = k if k.shape == v.shape else v
    fused = conjoin.optimize(model, (q, k, v))
    assert not is_fused(fused)
    assert not conjoin.report(model, (q, k, v)).groups
    assert_equivalent(fused, model, (q, k, v))


class Crossed(nn.Module):
    """Attention with layers of its own, whose keys and values may have other widths."""

    def __init__(self, kdim, vdim):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 6), nn.Linear(kdim, 6), nn.Linear(vdim, 6)

    def forward(self, query, key, value):
        q, k, v = self.q(query), self.k(key), self.v(value)
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(
    ("widths", "given", "groups"),
    [
        ((4, 4), "qkk", [("k", "v")]),
        ((4, 4), "qkv", []),
        ((4, 5), "qkw", []),
        ((6, 6), "qqq", [("q", "k", "v")]),
    ],
    ids=str,
)
def test_attention_with_other_widths_of_keys_and_values(widths, given, groups):
    """What reads one tensor has one width, and is merged; values of their own stay apart."""
    sizes = {"q": (3, 4, 6), "k": (3, 5, 4), "v": (3, 5, 4), "w": (3, 5, 5)}
    tensors = {name: torch.randn(size, dtype=torch.float64) for name, size in sizes.items()}
    inputs = tuple(tensors[name] for name in given)
    model = Crossed(*widths).double()
    assert [group.layers for group in conjoin.report(model, inputs).groups] == groups
    assert_equivalent(conjoin.optimize(model, inputs), model, inputs)


def test_code_that_goes_through_all_children_finds_no_products():
    class Chain(Pair):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4).double()

        def forward(self, x):
            y = x @ self.a + x @ self.b
            for layer in self._modules.values():
                y = layer(y)
            return y

    model = Chain()
    fused = conjoin.optimize(model, (X,))
    assert not is_fused(fused)
    assert_equivalent(fused, model, (X,))


def test_a_class_that_copies_itself_keeps_its_parameters():
    class Own(Pair):
        def __reduce__(self):
            return Own, ()

    model = Own()
    assert type(conjoin.optimize(model, (X,), inplace=True)) is Own


def test_products_behind_equal_operations():
    model = pair(lambda self, x: (torch.relu(x) @ self.a, torch.relu(x) @ self.b))
    fused = conjoin.optimize(model, (X,))
    counted = count(fused, (X,))
    assert (counted.products, counted.activations) == (1, 1)
    assert_equivalent(fused, model, (X,))


class Attention(nn.Module):
    """Its keys and values are siblings by themselves, and all three where one tensor is given."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (normal(6, 6) for _ in range(3))

    def forward(self, query, key, value):
        q, k, v = query @ self.q, key @ self.k, value @ self.v
        return (q @ k.t()).softmax(-1) @ v, key @ self.k


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.heads = nn.ModuleList([nn.Linear(6, 2), nn.Linear(6, 3)])

    def forward(self, x):
        y, k = self.attention(x, x, x)
        return [head(y) for head in self.heads], k


def test_siblings_that_a_caller_makes():
    model = Around().double()
    fused = conjoin.optimize(model, (X,))
    assert count(model, (X,)).products == 8
    assert_equivalent(fused, model, (X,))
    assert conjoin.verify(model, fused, (X,))


def test_products_that_no_forward_runs_are_given_back(monkeypatch):
    """A class may refuse to be made a subclass of."""
    monkeypatch.setattr(regions, "_become", lambda module, traced: None)
    model = Pair()
    fused = conjoin.optimize(model, (X,))
    assert type(fused) is Pair
    assert_same_structure(fused, model)
    assert_same_state(fused, model)
    assert not conjoin.report(model, (X,)).groups


@pytest.mark.parametrize("name", ["AutoInt", "MMoE", "Heads", "Einsum"])
def test_without_example_inputs(name):
    model, inputs = build(name)
    fused = conjoin.optimize(model)
    assert_equivalent(fused, model, inputs)
    layers = {group.layers for group in conjoin.report(model).groups if group.fused}
    assert layers <= {group.layers for group in conjoin.report(model, inputs).groups}
    assert any(set(each) & {n for n, _ in model.named_parameters()} for each in layers)
