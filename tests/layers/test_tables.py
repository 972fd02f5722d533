"""Embeddings that read a tensor each: one table, with offsets."""

import copy
import itertools
import pickle
import random

import pytest
import torch
from derivatives import assert_same_second_derivatives
from equivalence import assert_close, assert_equivalent, assert_same_state, assert_same_structure
from torch import nn
from torch.nn import functional as F

import conjoin
from conjoin import checkpoints
from conjoin.layers.view import View, wides
from conjoin.passes import Separate

ROWS = (5, 7, 5, 3)
"""The numbers of rows of the tables."""


def column(x, i):
    return x[:, i]


def selected(x, i):
    return x.select(1, i)


def converted(x, i):
    return x[:, i].long()


def from_behind(x, i):
    return x[:, i - len(ROWS)]


def turned(x, i):
    return x.t()[i]


WAYS = [column, selected, converted, from_behind, turned]
"""How models take their columns."""


class Model(nn.Module):
    """Tables, each of which reads a column; one of them is frozen or special where asked for."""

    def __init__(self, rows=ROWS, width=4, way=column, **options):
        super().__init__()
        self.way = way
        each = [{k: v[i] for k, v in options.items()} for i in range(len(rows))]
        pairs = zip(rows, each, strict=True)
        self.tables = nn.ModuleList(nn.Embedding(n, width, **its) for n, its in pairs)
        self.double()

    def embedded(self, x):
        return [table(self.way(x, i)) for i, table in enumerate(self.tables)]

    def forward(self, x):
        return torch.cat(self.embedded(x), -1).sin()


class Apart(Model):
    """Each gives its own."""

    def forward(self, x):
        return [rows.cos() for rows in self.embedded(x)]


class Given(Model):
    """A tensor for each table, by name."""

    def embedded(self, x):
        return [table(x[f"c{i}"]) for i, table in enumerate(self.tables)]


def numbers(*shape, rows=ROWS, dtype=torch.int64):
    """Row numbers that each table has: (..., n)."""
    each = [torch.randint(n, shape, dtype=dtype) for n in rows]
    return torch.stack(each, 1 if shape else 0)


def fused(model, x):
    return conjoin.optimize(model, (x,), policy="always")


def merged(model):
    """The numbers of tables that are one, for each such table."""
    return sorted(len(views) for views in wides(model).values())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cls", [Model, Apart])
def test_same_function(cls, way):
    plain, x = cls(way=way), numbers(6)
    model = fused(plain, x)
    assert merged(model) == [4]
    for each in (x, numbers(2), numbers(1), numbers(0), numbers(6, dtype=torch.int32)):
        assert_equivalent(model, plain, (each,))
    assert_same_state(model, plain)
    assert_same_structure(conjoin.unfuse(model), plain)
    assert_same_state(conjoin.unfuse(model), plain)


@pytest.mark.parametrize("shape", [(), (6,), (6, 3), (2, 3, 2)], ids=str)
def test_tensors_by_name(shape):
    plain = Given()
    x = {f"c{i}": torch.randint(n, shape) for i, n in enumerate(ROWS)}
    model = fused(plain, x)
    assert merged(model) == [4]
    assert_equivalent(model, plain, (x,))
    assert_equivalent(model, plain, ({name: each.unsqueeze(-1) for name, each in x.items()},))


def test_tensors_of_other_shapes_or_types():
    """What was alike in the example need not be so in each call."""
    plain = Given()
    x = {f"c{i}": torch.randint(n, (4, 1)) for i, n in enumerate(ROWS)}
    model = fused(plain, x)
    assert_equivalent(model, plain, ({**x, "c1": x["c1"].int()},))
    for each in (plain, model):
        with pytest.raises(RuntimeError, match="same number of dimensions"):
            each({**x, "c2": x["c2"].squeeze()})


PADDINGS = {
    "of none": (None, None, None, None),
    "of one": (None, -1, None, None),
    "the same row": (0, 0, 0, 0),
    "several": (None, 0, -2, 2),
}


@pytest.mark.parametrize("padding", PADDINGS.values(), ids=PADDINGS)
def test_padding_rows_never_train(padding):
    plain = Model(padding_idx=padding)
    with torch.no_grad():
        for table in plain.tables:
            table.weight.fill_(7.0).add_(torch.arange(4))  # Also those for padding.
    x = torch.tensor([[0, 0, 0, 0], [4, 6, 3, 2], [1, 0, 3, 2]])
    model = fused(plain, x)
    assert merged(model) == [4]
    assert_equivalent(model, plain, (x,))
    assert_same_second_derivatives(model, plain, x)


def test_gradients_that_are_scaled_by_frequency():
    plain = Model(scale_grad_by_freq=(True,) * 4, padding_idx=(None, 1, 0, None))
    x = torch.tensor([[1, 1, 0, 2], [1, 1, 0, 1], [1, 3, 2, 2]])
    model = fused(plain, x)
    assert merged(model) == [4]
    assert_equivalent(model, plain, (x,))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("beyond", [True, False])
def test_row_out_of_range_raises_as_before(place, beyond, grad):
    """Also where another table has the row."""
    plain, x = Model(), numbers(3)
    model = fused(plain, x)
    for row in (ROWS[place], 2**40, 2**63 - 1) if beyond else (-1, -ROWS[0], -(2**63)):
        x[1, place] = row
        messages = []
        for each in (plain, model):
            with torch.set_grad_enabled(grad), pytest.raises(IndexError) as error:
                each(x)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.int16, torch.bool])
def test_wrong_type_of_input_raises_as_before(dtype):
    plain, x = Model(), numbers(3)
    messages = []
    for each in (plain, fused(plain, x)):
        with pytest.raises(RuntimeError) as error:
            each(x.to(dtype))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_too_few_columns_raise_as_before():
    plain, x = Model(), numbers(3)
    for each in (plain, fused(plain, x)):
        with pytest.raises(IndexError):
            each(x[:, :3])
        each(torch.cat([x, x], 1))


OPTIONS = {
    "max_norm": ({"max_norm": (None, 1.0, None, None)}, [3]),
    "sparse": ({"sparse": (True, False, False, True)}, [2]),
    "scale_grad_by_freq": ({"scale_grad_by_freq": (True, False, False, True)}, [2, 2]),
}


@pytest.mark.parametrize(("options", "expected"), OPTIONS.values(), ids=OPTIONS)
def test_some_are_left_apart(options, expected):
    plain, x = Apart(**options), numbers(4)
    model = fused(plain, x)
    assert merged(model) == expected
    assert_close(
        {str(i): y for i, y in enumerate(model(x))}, {str(i): y for i, y in enumerate(plain(x))}
    )


def test_a_frozen_table_and_one_of_another_width():
    plain, x = Apart(rows=(5,) * 6), numbers(4, rows=(5,) * 6)
    plain.tables[1].requires_grad_(False)
    plain.tables[2] = nn.Embedding(5, 3).double()
    model = fused(plain, x)
    assert merged(model) == [4]
    assert not model.tables[1].weight.requires_grad
    assert_equivalent(model, plain, (x,))


def test_a_table_without_rows():
    plain, x = Apart(rows=(5, 0, 5, 3)), torch.zeros(2, 4, dtype=torch.int64)
    with torch.device("meta"):
        assert merged(fused(copy.deepcopy(plain).to("meta"), x.to("meta"))) == [3]


def test_shared_tables_stay_apart():
    plain, x = Apart(rows=(5,) * 5), numbers(4, rows=(5,) * 5)
    plain.tables[4].weight = plain.tables[0].weight
    model = fused(plain, x)
    assert merged(model) == [3]
    assert model.tables[4].weight is model.tables[0].weight
    assert_equivalent(model, plain, (x,))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_trains_alike(optimizer):
    plain, x = Model(padding_idx=(0, None, None, 1)), numbers(8)
    model = fused(plain, x)
    for each in (plain, model):
        stepping = optimizer(each.parameters(), lr=0.1, weight_decay=0.01)
        for shift in range(3):
            stepping.zero_grad()
            each(x.roll(shift, 0)).square().sum().backward()
            stepping.step()
    assert_close(model.state_dict(), plain.state_dict())
    assert_close(conjoin.unfuse(model).state_dict(), plain.state_dict())


def test_changed_between_columns_and_tables():
    """Columns are views: the tables read what they hold by then."""

    class Changed(Model):
        def forward(self, x):
            columns = [x[:, i] for i in range(4)]
            x.add_(1)
            return [table(c).sin() for table, c in zip(self.tables, columns, strict=True)]

    plain, x = Changed(rows=(9,) * 4), numbers(5)
    assert_equivalent(fused(plain, x), plain, (x,))


def test_changed_between_tables():
    class Changed(Model):
        def forward(self, x):
            first = self.tables[0](x[:, 0]) + self.tables[1](x[:, 1])
            x.add_(1)
            return first.sin() + (self.tables[2](x[:, 2]) + self.tables[3](x[:, 3])).cos()

    plain, x = Changed(rows=(9,) * 4), numbers(5)
    model = fused(plain, x)
    assert merged(model) == [2, 2]
    with torch.no_grad():  # Backward needs the numbers as they were.
        assert_close({"": model(x.clone())}, {"": plain(x.clone())})


def test_one_column_for_several():
    """Of one tensor too, where the tables differ in their rows; those that do not are siblings."""

    class Twice(Model):
        def forward(self, x):
            return [t(x[:, i // 2]).sin() for i, t in enumerate(self.tables)]

    plain, x = Twice(rows=(5, 6, 7, 8)), torch.randint(5, (6, 2))
    model = fused(plain, x)
    assert_equivalent(model, plain, (x,))


def test_copies_pickles_and_other_dtypes():
    plain, x = Model(padding_idx=(None, 0, None, 2)), numbers(4)
    model = fused(plain, x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert merged(again) == [4]
        assert_equivalent(again, plain, (x,))
        assert not set(again.parameters()) & set(model.parameters())
    assert_equivalent(copy.deepcopy(model).float(), copy.deepcopy(plain).float(), (x,))
    empty = copy.deepcopy(model).to_empty(device="cpu")
    empty.load_state_dict(plain.state_dict())
    assert_equivalent(empty, plain, (x,))


def test_meta():
    plain, x = Model(), numbers(4)
    with torch.device("meta"):
        empty = Model()
    model = fused(empty, x.to("meta"))
    model.load_state_dict(plain.state_dict(), assign=True)
    assert merged(model) == [4]
    assert_equivalent(model, plain, (x,))


def test_a_table_that_is_replaced():
    plain, x = Model(), numbers(4)
    model = fused(plain, x)
    for each in (plain, model):
        each.tables[1] = nn.Embedding(7, 4).double()
    model.tables[1].load_state_dict(plain.tables[1].state_dict())
    assert_close({"": model(x)}, {"": plain(x)})


def test_one_table_by_itself():
    plain, x = Model(padding_idx=(None, 0, None, 2)), numbers(4)
    model = fused(plain, x)
    assert all(isinstance(table, View) for table in model.tables)
    for i, table in enumerate(model.tables):
        outputs = [each.tables[i](x[:, i]).sin() for each in (model, plain)]
        assert_close({"": outputs[0]}, {"": outputs[1]})
        for output in outputs:
            output.sum().backward()
        assert_close({"": table.weight.grad}, {"": plain.tables[i].weight.grad})


@pytest.mark.parametrize("training", [True, False])
def test_compiled(training):
    plain, x = Model(padding_idx=(None, 0, None, 2)), numbers(4)
    model = fused(plain, x).train(training)
    graphs = []

    def keep(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=keep, fullgraph=True)
    for each in (x, numbers(7)):
        assert_close({"": compiled(each)}, {"": plain(each)})
    nodes = [node for node in graphs[0].graph.nodes if "embedding" in str(node.target)]
    assert len(nodes) == 1
    torch._dynamo.reset()


def test_exported():
    """A program has no place for the tensor of offsets; a model that was merged before has."""
    plain, x = Model(), numbers(4)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(plain, (x,), dynamic_shapes=({0: batch},))
    made = conjoin.optimize(program)
    found = [node for node in made.graph.nodes if "embedding" in str(node.target)]
    assert len(found) == 4
    for each in (x, numbers(7)):
        assert_close({"": made.module()(each)}, {"": plain(each)})
    assert_same_state(conjoin.unfuse(made).module(), program.module())
    exported = torch.export.export(fused(plain, x), (x,), dynamic_shapes=({0: batch},))
    found = [node for node in exported.graph.nodes if "embedding" in str(node.target)]
    assert len(found) == 1
    x = numbers(7)
    assert_close({"": exported.module()(x)}, {"": plain(x)})


def test_separated():
    rows = ROWS * 2
    traced = torch.fx.symbolic_trace(Model(rows=rows))
    plain, x = copy.deepcopy(traced), numbers(4, rows=rows)
    conjoin.passes.rewrite(traced)
    assert any(str(node.target).endswith("wide") for node in traced.graph.nodes)
    assert_equivalent(traced, plain, (x,))
    Separate()(traced)
    assert not any(str(node.target).endswith("wide") for node in traced.graph.nodes)
    assert_equivalent(traced, plain, (x,))


def test_the_order_is_that_of_a_joint():
    class Permuted(Model):
        def forward(self, x):
            rows = self.embedded(x)
            return torch.cat([rows[i] for i in (2, 0, 3, 1)], -1).sin()

    plain, x = Permuted(), numbers(4)
    assert_equivalent(fused(plain, x), plain, (x,))


def test_stacked_outputs():
    for dim, cls in itertools.product((0, 1, -2), (Model, Given)):

        class Stacked(cls):
            def forward(self, x, dim=dim):
                return torch.stack(self.embedded(x), dim).sin()

        plain = Stacked()
        x = numbers(4)
        x = x if cls is Model else {f"c{i}": x[:, i] for i in range(4)}
        assert_equivalent(fused(plain, x), plain, (x,))


class Factorized(nn.Module):
    """Each column is read by a weight and by a vector, as factorization machines do."""

    def __init__(self, columns=8, width=4, first=1):
        super().__init__()
        self.weights = nn.ModuleList(nn.Embedding(5, first) for _ in range(columns))
        self.vectors = nn.ModuleList(nn.Embedding(5, width) for _ in range(columns))
        self.double()

    def column(self, x, i):
        return x[:, i]

    def forward(self, x):
        tables = self.weights, self.vectors
        first, vectors = (
            torch.stack([table(self.column(x, i)) for i, table in enumerate(each)], 1)
            for each in tables
        )
        squares = vectors.sum(1).square() - vectors.square().sum(1)
        return first.sum(1).sum(1, keepdim=True) + squares.sum(1, keepdim=True) / 2


class ByName(Factorized):
    """The columns are tensors of their own, so that two tables are seen to read one."""

    def column(self, x, i):
        return x[f"c{i}"]


@pytest.mark.parametrize("first", [1, 4])
@pytest.mark.parametrize("cls", [Factorized, ByName])
def test_tables_that_have_siblings(cls, first):
    """Those of all columns at once are fewer launches than both of each column."""
    plain, x = cls(first=first).eval(), numbers(6, rows=(5,) * 8)
    x = x if cls is Factorized else {f"c{i}": x[:, i] for i in range(8)}
    model = conjoin.optimize(plain, (x,))
    if cls is Factorized:
        assert merged(model) == ([8, 8] if first == 1 else [16])
    elif first == 1:  # What is joined at each call does not pay, and stays apart.
        assert merged(model) == [8, 8]
    assert_equivalent(model, plain, (x,))
    assert_same_state(conjoin.unfuse(model), plain)
    groups = conjoin.report(plain, (x,)).groups
    names = [name for group in groups for name in group.layers]
    assert len(names) == len({*names}) == 16
    assert all(group.fused for group in groups)


def test_few_columns_are_read_by_siblings():
    plain, x = Factorized(columns=3, first=4), numbers(6, rows=(5,) * 3)
    model = conjoin.optimize(plain, (x,))
    assert merged(model) == [2, 2, 2]
    assert_equivalent(model, plain, (x,))


JOINTS = {
    "cat": lambda rows, dim: torch.cat(rows, dim),
    "stack": lambda rows, dim: torch.stack(rows, dim),
    "sum": lambda rows, dim: sum(rows),
    "products": lambda rows, dim: torch.cat([row * rows[0] for row in rows[1:]], dim),
    "activated": lambda rows, dim: torch.cat([row.relu() for row in rows], dim),
    "changed": lambda rows, dim: torch.cat([row.mul_(2).tanh_() for row in rows], dim),
    "some": lambda rows, dim: torch.cat(rows[1:], dim) * rows[0].sum(),
    "normalized": lambda rows, dim: torch.stack([F.layer_norm(r, r.shape[-1:]) for r in rows], dim),
}
"""What becomes of the rows."""


class Drawn(Model):
    """The rows joined in some order, or what else becomes of them."""

    def __init__(self, order, joint, dim, *args, **options):
        super().__init__(*args, **options)
        self.order, self.joint, self.dim = order, joint, dim

    def forward(self, x):
        rows = self.embedded(x)
        return self.joint([rows[i] for i in self.order], self.dim).sin()


@pytest.mark.parametrize("seed", range(40))
def test_random(seed):
    draw = random.Random(seed)
    count = draw.randint(2, 9)
    rows = [draw.randint(1, 6) for _ in range(count)]
    padding = [draw.choice([None, None, draw.randrange(n)]) for n in rows]
    order = tuple(draw.sample(range(count), count))
    joint, way = JOINTS[draw.choice([*JOINTS])], draw.choice([column, selected, converted, turned])
    width, dim = draw.randint(1, 3), draw.choice([-1, 1])
    plain = Drawn(order, joint, dim, rows, width, way, padding_idx=padding)
    x = numbers(draw.randint(1, 5), rows=rows)
    model = fused(plain, x)
    assert merged(model) == [count]
    assert_equivalent(model, plain, (x,))
    assert_equivalent(model, plain, (numbers(draw.randint(1, 9), rows=rows),))
    assert_same_state(conjoin.unfuse(model), plain)


@pytest.mark.parametrize(("training", "expected"), [(True, [2, 2, 2]), (False, [])])
def test_siblings_of_two_widths_in_a_graph(training, expected):
    """They are read one by one where no gradient touches all their rows."""
    plain, x = Factorized(columns=3).train(training), numbers(6, rows=(5,) * 3)
    model = conjoin.optimize(plain, (x,))
    assert merged(model) == expected
    assert_equivalent(model, plain, (x,))


@pytest.mark.parametrize("way", [column, turned])
def test_columns_are_made_numbers_at_once(way):
    """Also where they stand among values of another type."""

    class Cast(Model):
        def column(self, x, i):
            return self.way(x, i).long()

        def forward(self, x):
            return torch.cat([t(self.column(x, i)) for i, t in enumerate(self.tables)], -1).sin()

    rows = ROWS * 2
    plain, x = Cast(rows, 4, way), numbers(6, rows=rows)
    traced = torch.fx.symbolic_trace(plain)
    conjoin.passes.rewrite(traced)
    assert [node.target for node in traced.graph.nodes].count("long") == 1
    assert_equivalent(traced, plain, (x.double() + 0.5,))
    Separate()(traced)
    assert [node.target for node in traced.graph.nodes].count("long") == 8
    assert_equivalent(traced, plain, (x.double() + 0.5,))
    assert_equivalent(fused(plain, x.double()), plain, (x.double(),))


def test_changed_after_columns_were_made_numbers():
    class Changed(Model):
        def forward(self, x):
            columns = [x[:, i].long() for i in range(4)]
            x.mul_(0)
            return [table(c).sin() for table, c in zip(self.tables, columns, strict=True)]

    plain, x = Changed(), numbers(5).double()
    model = fused(plain, x)
    assert merged(model) == [4]
    for each in (x, x.long()):  # A column that is of the type already is a view of it.
        assert_equivalent(model, plain, (each,))


def test_the_optimizers_state_comes_back():
    plain, x = Model(padding_idx=(None, 0, None, 2)), numbers(8)
    model = fused(plain, x)
    first = torch.optim.Adam(model.parameters())
    model(x).square().sum().backward()
    first.step()
    separate = conjoin.unfuse(model)
    second = torch.optim.Adam(separate.parameters())
    second.load_state_dict(checkpoints.separate(first, model))
    merged_again = fused(separate, x)
    third = torch.optim.Adam(merged_again.parameters())
    state = copy.deepcopy(second.state_dict())  # It shares the numbers of steps.
    third.load_state_dict(checkpoints.merge(state, third, merged_again))
    for each, optimizer in ((model, first), (separate, second), (merged_again, third)):
        optimizer.zero_grad()
        each(x).square().sum().backward()
        optimizer.step()
    assert_close(separate.state_dict(), model.state_dict())
    assert_close(merged_again.state_dict(), model.state_dict())


def test_tensors_by_name_compiled():
    """As many graphs as the plain model has, for batches of several sizes."""
    plain = Given()
    calls = [{f"c{i}": torch.randint(n, (b,)) for i, n in enumerate(ROWS)} for b in (4, 7, 9)]
    model = fused(plain, calls[0])
    counts = []
    for each in (plain, model):
        graphs = []

        def keep(graph_module, inputs, graphs=graphs):
            graphs.append(graph_module)
            return graph_module

        torch._dynamo.reset()
        compiled = torch.compile(each, backend=keep, fullgraph=True)
        for x in calls:
            assert_close({"": compiled(x)}, {"": plain(x)})
        counts.append(len(graphs))
        torch._dynamo.reset()
    assert counts[0] == counts[1]


def test_tables_that_are_read_twice():
    """As those of DeepFM, by its two parts, each of which looks the columns up itself."""

    class Twice(Model):
        def forward(self, x):
            return torch.cat(self.embedded(x), -1).sin(), sum(self.embedded(x)).cos()

    plain, x = Twice(), numbers(6)
    model = fused(plain, x)
    assert merged(model) == [4]
    assert_equivalent(model, plain, (x,))
