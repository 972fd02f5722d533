"""Golden files: `CONJOIN_REGENERATE=1 pytest tests/reports/test_report.py` writes them anew."""

import dataclasses
import itertools
import json
import os
import re
from pathlib import Path

import pytest

from conjoin.graph.depth import Chain
from conjoin.graph.site import Untraced
from conjoin.launches import Count, Launches
from conjoin.legality import Reason, Refusal
from conjoin.reports.report import Group, Report

GOLDEN = Path(__file__).parents[1] / "golden"
NOT_COUNTED = Launches(Count(None, None), Count(None, None))


def heads(**changes):
    fields = {
        "kind": "Linear",
        "layers": ("mu", "logvar"),
        "fused": True,
        "reason": None,
        "detail": "",
        "widths": (64, 64),
        "launches": (2, 1),
    }
    return Group(**{**fields, **changes})


def attention(block):
    names = tuple(f"blocks.{block}.attn.{name}" for name in "qkv")
    return heads(layers=names, widths=(768, 256, 256), launches=(3, 1))


def gate(block):
    names = (f"blocks.{block}.mlp.gate", f"blocks.{block}.mlp.up")
    return heads(
        layers=names,
        fused=False,
        reason=Reason.BIAS_ON_SOME,
        detail=f"{names[1]} has none",
        widths=(3072, 3072),
        launches=(2, 2),
    )


def transformer():
    return Report(
        groups=tuple(itertools.chain.from_iterable((attention(i), gate(i)) for i in range(12))),
        launches=Launches(Count(190, 412), Count(166, 376)),
        untraced=(
            Untraced("", "branches on the value of x.shape[1]"),
            *(Untraced(f"blocks.{i}.norm", "iterates over a Proxy") for i in range(12)),
        ),
        observed=True,
    )


def unet():
    projections = (
        *(f"down_blocks.{i}.resnets.{j}.time_emb_proj" for i in range(4) for j in range(2)),
        *(f"mid_block.resnets.{j}.time_emb_proj" for j in range(2)),
        *(f"up_blocks.{i}.resnets.{j}.time_emb_proj" for i in range(4) for j in range(3)),
    )
    widths = (320,) * 2 + (640,) * 2 + (1280,) * 12 + (640,) * 3 + (320,) * 3
    return Report(
        groups=(
            heads(layers=projections, widths=widths, launches=(22, 1)),
            heads(
                kind="ConvTranspose2d",
                layers=("decoder.up.image", "decoder.up.mask"),
                fused=False,
                reason=Reason.DIFFERENT_SETTINGS,
                detail="kernel_size: (4, 4) and (2, 2); padding: (1, 1) and (0, 0)",
                widths=(3, 1),
            ),
            heads(
                kind="Conv2d",
                layers=("a|b", "c, d"),
                fused=False,
                detail="estimate: the wide form takes 1.2 times as long at 4x64x512x512",
                widths=(64, 8),
            ),
        ),
        launches=Launches(Count(720, None), Count(699, None)),
        untraced=(),
        observed=True,
    )


def unit(block):
    """Three branches go on alike, and then two of them."""
    first = tuple(f"mixed.{block}.{name}" for name in ("one.0", "two.0.0", "three.0.0"))
    norms = tuple(name.removesuffix("0") + "1" for name in first)
    second = tuple(f"mixed.{block}.{name}" for name in ("two.1.0", "three.1.0"))
    common = ("Conv2d", "BatchNorm2d", "ReLU")
    depth = (Chain(3, common, norms), Chain(2, (*common, "Conv2d", "max_pool2d"), second))
    return heads(kind="Conv2d", layers=first, widths=(64, 48, 64), launches=(13, 6), depth=depth)


def inception():
    critics = Chain(2, ("Linear", "relu", "Linear"), ("critics.0.2", "critics.1.2"))
    return Report(
        groups=(
            unit(0),
            unit(1),
            heads(layers=("critics.0.0", "critics.1.0"), launches=(6, 3), depth=(critics,)),
        ),
        launches=Launches(Count(60, 100), Count(43, 80)),
        untraced=(),
        observed=True,
    )


def unobserved():
    return Report(
        groups=(heads(launches=None),),
        launches=NOT_COUNTED,
        untraced=(Untraced("encoder", "calls len() on a Proxy"),),
        observed=False,
    )


def nothing():
    return Report(groups=(), launches=NOT_COUNTED, untraced=(), observed=False)


REPORTS = [transformer, unet, inception, unobserved, nothing]
FORMATS = {"txt": str, "md": Report.to_markdown, "json": Report.to_json}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("build", REPORTS, ids=lambda build: build.__name__)
def test_golden(build, suffix):
    path = GOLDEN / f"report_{build.__name__}.{suffix}"
    text = FORMATS[suffix](build()) + "\n"
    if os.environ.get("CONJOIN_REGENERATE"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("build", REPORTS, ids=lambda build: build.__name__)
def test_the_table_fits_120_columns_without_trailing_space(build):
    lines = str(build()).splitlines()
    assert max(map(len, lines)) <= 120
    assert not [line for line in lines if line != line.rstrip()]


def test_a_long_list_of_names_stays_within_the_columns():
    names = tuple("experts." + "x" * (i % 7 + 1) + str(i) for i in range(80))
    refused = heads(
        layers=names,
        widths=tuple(range(80)),
        fused=False,
        reason=Reason.CALLED_APART,
        detail=", ".join(names),
    )
    report = Report((refused,), NOT_COUNTED, (), observed=True)
    assert max(map(len, str(report).splitlines())) <= 120


def test_every_layer_is_in_the_table():
    text = "".join(line for line in str(unet()).splitlines())
    names = itertools.chain.from_iterable(group.layers for group in unet().groups)
    last = {name.rpartition(".")[2] for name in names}
    assert all(name in text for name in last)


def test_groups_that_repeat_become_one_line_with_their_number():
    rows = [line.split() for line in str(transformer()).splitlines() if "attn" in line]
    assert rows == [
        [
            "Linear",
            "blocks.{0..11}.attn.{q,k,v}",
            "12",
            "768+256+256",
            "->",
            "1280",
            "36",
            "->",
            "12",
        ]
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"widths": (768, 128, 128)},
        {"kind": "Conv2d"},
        {"fused": False, "reason": Reason.HOOKS},
        {"detail": "padded"},
        {"launches": (4, 1)},
        {"depth": (Chain(3, ("Linear", "relu")),)},
    ],
)
def test_groups_that_differ_have_lines_of_their_own(changes):
    other = dataclasses.replace(attention(1), **changes)
    report = Report((attention(0), other), NOT_COUNTED, (), observed=True)
    assert "blocks.0.attn.{q,k,v}" in str(report)
    assert "blocks.1.attn.{q,k,v}" in str(report)


def test_a_number_inside_a_word_is_not_a_block():
    groups = (heads(layers=("conv1.a", "conv1.b")), heads(layers=("conv2.a", "conv2.b")))
    text = str(Report(groups, NOT_COUNTED, (), observed=True))
    assert "conv1.{a,b}" in text
    assert "conv2.{a,b}" in text


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (8, 6, "25.0% fewer"),
        (8, 9, "12.5% more"),
        (8, 8, "unchanged"),
        (0, 0, "unchanged"),
        (0, 2, "2 more"),
        (3, None, "not counted"),
    ],
)
def test_totals_say_what_changed(before, after, words):
    launches = Launches(Count(1, before), Count(1, after))
    report = Report((heads(),), launches, (), observed=True)
    assert words in str(report)
    assert words in report.to_markdown()


def test_json_holds_the_whole_report():
    report = transformer()
    content = json.loads(report.to_json())
    assert list(content) == ["groups", "launches", "untraced", "observed", "memory"]
    assert [tuple(group["layers"]) for group in content["groups"]] == [
        group.layers for group in report.groups
    ]
    assert content["groups"][1]["reason"] == {
        "name": "BIAS_ON_SOME",
        "sentence": Reason.BIAS_ON_SOME.value,
    }
    assert content["groups"][0]["reason"] is None
    assert content["groups"][0]["launches"] == {"before": 3, "after": 1}
    assert content["launches"]["before"] == {"forward": 190, "backward": 412}
    assert content["untraced"][0] == {"module": "", "why": "branches on the value of x.shape[1]"}


def test_depth_is_in_all_formats():
    report = inception()
    text = "2 branches: Linear, relu, Linear"
    assert text in " ".join(str(report).replace("critics.{0,1}.0", "").split())
    assert f"6 -> 3; {text}" in report.to_markdown()
    depth = json.loads(report.to_json())["groups"][0]["depth"]
    assert [(chain["branches"], len(chain["operations"])) for chain in depth] == [(3, 3), (2, 5)]
    assert depth[1]["layers"] == ["mixed.0.two.1.0", "mixed.0.three.1.0"]


def test_layers_behind_the_siblings_are_counted():
    assert str(inception()).startswith(
        "3 groups of sibling layers (8 layers, 12 more behind them): 3 fused."
    )


def test_groups_of_equal_depth_share_a_line():
    """The launches are those of both; the depth is that of each."""
    rows = [row for row in inception().to_markdown().splitlines() if "mixed" in row]
    assert len(rows) == 1
    assert "26 -> 12; 3 branches: Conv2d, BatchNorm2d, ReLU; 2 branches:" in rows[0]


def test_markdown_tables_have_the_same_cells_in_every_row():
    for build in REPORTS:
        for table in re.findall(r"(?:^\|.*\n?)+", build().to_markdown(), re.MULTILINE):
            counts = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
            assert len(counts) == 1


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_is_a_sentence_and_a_remedy(reason):
    assert re.fullmatch(r"[A-Z][^\n]*[^.]\. [A-Z][^\n]*\.", reason.value)
    assert len(re.findall(r"\. ", reason.value)) == 1


def test_a_refusal_reads_as_one_line():
    refusal = Refusal(("a", "b"), Reason.BIAS_ON_SOME, "b has none")
    assert str(refusal) == f"a, b: {Reason.BIAS_ON_SOME.value} (b has none)"
    assert str(Refusal(("a",), Reason.HOOKS, "")) == f"a: {Reason.HOOKS.value}"
