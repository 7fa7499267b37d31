"""Tables for notebooks: names are escaped, cells are readable in grey."""

from __future__ import annotations

import re

import datasets
import tiny

from pgp_hf import TaskStream
from pgp_hf.data.markup import shorten_names, table
from pgp_hf.metrics._running import Accuracies
from pgp_hf.training.results import StreamResults


def test_texts_are_escaped():
    page = table("<title>", ["<a>"], [["<b>&"], [None]])
    assert "<b>&lt;title&gt;</b>" in page and "<th>&lt;a&gt;</th>" in page
    assert "<td>&lt;b&gt;&amp;</td>" in page and "<td></td>" in page


def test_text_contrasts_with_every_shade():
    page = table("", [""], [[i] for i in range(101)], [[i / 100] for i in range(101)])
    found = re.findall(r"background-color: rgb\((\d+), \1, \1\); color: (white|black)", page)
    assert len(found) == 101 and [int(found[i][0]) for i in (0, 100)] == [255, 80]

    def luminance(grey):
        return ((grey / 255 + 0.055) / 1.055) ** 2.4

    for grey, color in found:
        light, dark = sorted((luminance(int(grey)), 1.0 if color == "white" else 0.0), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, grey  # WCAG AA


def test_many_names_are_shortened():
    assert shorten_names(list("abcdefgh")) == "a, b, c, d, e, f, g, h"
    assert shorten_names(list("abcdefghij")) == "a, b, c, d, e, f, g, h and 2 more"


def test_a_stream_shows_its_tasks():
    stream = tiny.stream()
    page = stream._repr_html_()
    assert "TaskStream(class_incremental: 6 classes in 3 tasks, seed=0)" in page and page.count("<tr>") == 4
    assert "<td>1</td><td>class 3, class 2</td><td>16</td><td>8</td>" in page
    assert TaskStream.empty()._repr_html_().count("<tr>") == 1
    data = tiny.data(classes=2)
    odd = datasets.ClassLabel(names=["<script>", "b&w"])
    page = tiny.stream(dataset=data.cast_column("label", odd), num_tasks=1, seed=None)._repr_html_()
    assert "&lt;script&gt;, b&amp;w" in page and "<script>" not in page


def test_results_show_their_matrix():
    results = StreamResults(
        "l2p", "l2p", "pgp", "linear", "class_incremental", 3, 0, "seen", False, within=Accuracies()
    )
    assert "l2p with pgp projection, none of 3 tasks</b>" in results._repr_html_()
    results.matrix, results.drift, results.rank = [[100.0], [50.0, None]], [0.0, None], [1, 2]
    page = results._repr_html_()
    assert (
        "l2p with pgp projection, 2 of 3 tasks, forgetting 50.00</b>" in page and page.count("<tr>") == 3
    )  # no average is known
    assert "<td>after task 2</td>" in page and ">50.0</td><td></td><td></td>" in page and "None" not in page
    results.matrix[1][1] = 75.0
    assert "average accuracy 62.50 %, forgetting 50.00</b>" in results._repr_html_()
