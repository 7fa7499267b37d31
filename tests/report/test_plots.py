"""Figures: what is drawn, that it is a PNG written whole, and that pyplot is left alone."""

from __future__ import annotations

import os
import sys
from functools import partial

import numpy as np
import pytest
import tiny
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.text import Text
from PIL import Image

from pgp_hf import metrics
from pgp_hf.report import drawing as _drawing
from pgp_hf.report import figures as plots
from pgp_hf.report import several


def make_results(tasks: int, rows: int | None = None, seed: int = 0, pool: int = 10) -> dict:
    rng = np.random.default_rng(seed)
    rows = rows or tasks
    matrix = [[float(rng.uniform(40, 99)) if j <= i else None for j in range(tasks)] for i in range(rows)]
    return {
        "accuracy_matrix": matrix,
        **metrics.summarize(matrix),
        "drift": [0.01 * i for i in range(rows)],
        "changed_selections": [0.02 * i for i in range(rows)],
        "projection_rank": [3 + i for i in range(rows)],
        "prompt_usage": rng.integers(0, 50, (rows, pool)).tolist(),
    }


def with_heads(results: dict) -> dict:
    """The same with a linear head whose accuracies are half as good."""
    half = [[None if a is None else a / 2 for a in row] for row in results["accuracy_matrix"]]
    heads = {"linear": {"accuracy_matrix": half}, "statistics": {"accuracy_matrix": results["accuracy_matrix"]}}
    return {**results, "head": "statistics", "heads": heads}


@pytest.fixture
def figures(monkeypatch):
    """The matplotlib figures that would be written, in their order."""
    seen = []
    monkeypatch.setattr(_drawing, "save", lambda fig, path: seen.append(fig))
    return seen


def lines(fig) -> dict[str, dict[str, list[float]]]:
    """Panel title -> label -> drawn values."""
    return {
        axes.get_title(loc="left"): {line.get_label(): list(line.get_ydata()) for line in axes.lines}
        for axes in fig.axes
        if axes.lines
    }


def cells(fig) -> dict[tuple[int, int], str]:
    return {(int(t.get_position()[1]), int(t.get_position()[0])): t.get_text() for t in fig.axes[0].texts}


def names_beside(axes) -> dict[str, float]:
    """What is written on the right of a panel's lines, and at which height (0 to 1)."""
    return {text.get_text(): text.xyann[1] for text in axes.texts}


@pytest.mark.parametrize("tasks", tiny.some_of([1, 5], 5))
def test_save_figures_writes_a_png_and_an_svg_of_each_and_nothing_else(tmp_path, tasks):
    results = make_results(tasks)
    written = plots.save_figures(results, tmp_path / "new" / "figures")
    names = ["accuracy_matrix.png", "task_curves.png", "forgetting_by_task.png", "stability.png", "prompt_usage.png"]
    names = [name for name in names if tasks > 1 or name != "forgetting_by_task.png"]
    assert [path.name for path in written] == names
    both = {file for path in written for file in (path, path.with_suffix(".svg"))}
    assert {*(tmp_path / "new" / "figures").iterdir()} == both
    for path in written:
        with Image.open(path) as image:
            image.load()
            assert image.format == "PNG" and min(image.size) > 300
            assert [round(dpi) for dpi in image.info["dpi"]] == [200, 200]
            assert np.asarray(image.convert("L")).std() > 1  # not blank


def test_figures_are_drawn_only_where_recorded(tmp_path):
    results = make_results(3)
    del results["prompt_usage"]
    names = ["accuracy_matrix.png", "task_curves.png", "forgetting_by_task.png", "stability.png"]
    assert [p.name for p in plots.save_figures(results, tmp_path)] == plots.figure_names(results) == names
    results |= {"drift": [], "changed_selections": [], "projection_rank": [0, 0, 0]}
    assert plots.figure_names(results) == names[:3]


def as_one(results: dict) -> dict:
    """The same run with its last row alone, as if all tasks had been learned as one."""
    last = len(results["accuracy_matrix"]) - 1
    matrix = [[None] * (last + 1)] * last + results["accuracy_matrix"][last:]
    flat = {name: [0] * (last + 1) for name in ("drift", "changed_selections", "projection_rank")}
    return {**results, "accuracy_matrix": matrix, **metrics.summarize(matrix), **flat}


def test_tasks_learned_as_one_have_no_curves(tmp_path, figures):
    results = as_one(make_results(3))
    names = ["accuracy_matrix.png", "prompt_usage.png"]
    assert [path.name for path in plots.save_figures(results, tmp_path)] == plots.figure_names(results) == names
    assert cells(figures[0]) == {(2, j): f"{value:.1f}" for j, value in enumerate(results["accuracy_matrix"][2])}
    drawn = figures[0].axes[0].images[0].get_array()
    assert np.ma.getmaskarray(drawn).tolist() == [[True] * 3, [True] * 3, [False] * 3]


def test_tasks_learned_as_one_are_a_point_among_the_curves_of_others(tmp_path, figures):
    runs = {"one by one": make_results(3), "joint": as_one(make_results(3, seed=1))}
    plots.task_curves(runs, tmp_path / "a.png")
    drawn = lines(figures[0])
    accuracy = drawn.pop("Average accuracy (%)")
    assert np.isnan(accuracy["joint"][:2]).all() and accuracy["joint"][2] == runs["joint"]["average_accuracy"]
    assert len(drawn) == 4 and all(list(panel) == ["one by one"] for panel in drawn.values())
    plots.task_curves(with_heads(runs["joint"]), tmp_path / "b.png")
    assert list(lines(figures[1])) == ["Average accuracy (%)"]
    with pytest.raises(ValueError, match="no values of forgetting"):
        plots.task_curves({"joint": runs["joint"]}, tmp_path / "c.png", panels=["forgetting"])


def test_matrix_cells_hold_the_numbers_and_nulls_stay_blank(tmp_path, figures):
    results = make_results(4, rows=3)
    results["accuracy_matrix"][0][2] = 12.34  # evaluated before it was trained
    plots.accuracy_matrix(results, tmp_path / "a.png")
    expected = {
        (i, j): f"{value:.1f}"
        for i, row in enumerate(results["accuracy_matrix"])
        for j, value in enumerate(row)
        if value is not None
    }
    assert cells(figures[0]) == expected
    drawn = figures[0].axes[0].images[0].get_array()
    assert drawn.shape == (4, 4) and int((~np.ma.getmaskarray(drawn)).sum()) == len(expected)


def test_curves_of_one_run(tmp_path, figures):
    results = make_results(5)
    plots.save_figures(results, tmp_path)
    curves, moved = (lines(fig) for fig in figures[1:4:2])
    assert list(curves) == ["Average accuracy (%)", "Forgetting (percentage points)"]
    (accuracy,), (forgetting,) = (list(panel.values()) for panel in curves.values())
    assert accuracy == pytest.approx(results["per_task_average_accuracy"])
    assert forgetting[0] == 0 and forgetting[-1] == pytest.approx(results["forgetting"])
    assert forgetting[2] == pytest.approx(metrics.forgetting(results["accuracy_matrix"][:3]))
    units = ["(relative)", "(% of old images)", "(directions)"]
    assert [title.partition(" (")[1][1:] + title.partition(" (")[2] for title in moved] == units
    drift, changed, rank = (panel.popitem()[1] for panel in moved.values())
    assert drift == pytest.approx(results["drift"]) and rank == pytest.approx(results["projection_rank"])
    assert changed == pytest.approx([0, 2, 4, 6, 8])
    assert not any(fig.legends or any(map(names_beside, fig.axes)) for fig in figures[1:4:2])


def test_both_heads_are_drawn_and_named(tmp_path, figures):
    results = with_heads(make_results(4))
    plots.save_figures(results, tmp_path)
    curves, moved = figures[1], lines(figures[3])
    average = lines(curves)["Average accuracy (%)"]
    assert list(average) == ["statistics head", "linear head"]
    assert average["linear head"] == pytest.approx([a / 2 for a in results["per_task_average_accuracy"]])
    assert [set(names_beside(axes)) for axes in curves.axes] == [set(average)] * 2 and not curves.legends
    assert all(len(panel) == 1 for panel in moved.values())  # the features are the same
    assert not any(map(names_beside, figures[3].axes))


def test_curves_of_several_runs_differ_in_colour_marker_and_dash(tmp_path, figures):
    runs = {f"run {k}": make_results(4 + k % 2, seed=k) for k in range(9)}  # too many names to stand beside lines
    plots.task_curves(runs, tmp_path / "c.png")
    fig = figures[0]
    assert not fig.legends and not fig.axes[5].axison  # the place without a panel holds the legend
    assert [text.get_text() for text in fig.axes[5].get_legend().get_texts()] == list(runs)
    assert not any(map(names_beside, fig.axes))
    for axes in fig.axes[:5]:
        styles = [(line.get_color(), line.get_marker(), str(line.get_linestyle())) for line in axes.lines]
        assert len(set(styles)) == len(runs)
        assert len({(marker, dash) for _, marker, dash in styles}) == len(runs)  # told apart without colour
        assert [line.get_label() for line in axes.lines] == list(runs)


@pytest.mark.parametrize("ranks", [[None, None, None], [0, 0, 0]])
def test_a_run_without_some_values_keeps_its_style_and_empty_panels_go(tmp_path, figures, ranks):
    with_rank, without = make_results(3), make_results(3, seed=1)
    without["projection_rank"] = ranks
    for run in (with_rank, without):
        run["drift"] = []
        del run["changed_selections"]
    plots.task_curves({"L2P": without, "L2P-PGP": with_rank}, tmp_path / "c.png")
    panels = lines(figures[0])
    assert list(panels) == [plots.PANELS[name].title for name in ("accuracy", "forgetting", "rank")]
    assert list(panels["Protected rank (directions)"]) == ["L2P-PGP"]
    drawn = [axes for axes in figures[0].axes if axes.lines]
    colours = [{line.get_label(): line.get_color() for line in axes.lines} for axes in drawn]
    assert colours[0]["L2P-PGP"] == colours[2]["L2P-PGP"] != colours[0]["L2P"]
    assert [set(names_beside(axes)) for axes in drawn] == [{"L2P", "L2P-PGP"}] * 2 + [{"L2P-PGP"}]


def test_names_beside_lines_point_at_their_ends_and_stay_apart(tmp_path, figures):
    runs = {f"run {k}": make_results(6 - k, seed=k) for k in range(5)}
    runs["run 1"]["accuracy_matrix"] = runs["run 0"]["accuracy_matrix"]  # on top of each other
    plots.task_curves(runs, tmp_path / "c.png", panels=["accuracy"])
    (axes,) = figures[0].axes
    for line in axes.lines:
        (name,) = [text for text in axes.texts if text.get_text() == line.get_label()]
        assert tuple(name.xy) == (line.get_xdata()[-1], line.get_ydata()[-1])
        assert name.arrow_patch.get_edgecolor() == to_rgba(line.get_color())
    heights = names_beside(axes)
    ends = {line.get_label(): line.get_ydata()[-1] for line in axes.lines}
    order = sorted(heights, key=heights.get)
    assert [ends[name] for name in order] == sorted(ends.values())
    gaps = np.diff(sorted(heights.values()))
    assert gaps.min() > 0.1 and min(heights.values()) >= 0 and max(heights.values()) <= 1


@pytest.mark.parametrize("heights", [[0.5], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.2, 0.25, 0.9, 0.95, 1.0]])
def test_heights_are_moved_apart_as_little_as_needed(heights):
    moved = _drawing._apart(heights, gap=0.1)
    assert np.diff([*moved, 9]).min() > 0.1 - 1e-9 and min(moved) >= 0 and max(moved) <= 1
    assert _drawing._apart([0.1, 0.5, 0.9], gap=0.1) == [0.1, 0.5, 0.9]


@pytest.mark.parametrize(("low", "high"), [(71.0, 88.0), (3.0, 41.0)])
def test_the_colours_of_a_matrix_span_all_accuracies_and_rise_in_grey(low, high):
    fig = plots.accuracy_matrix({"accuracy_matrix": [[high, None], [low, high]]})
    image = fig.axes[0].images[0]
    assert image.get_clim() == (0, 100)
    grey = [rgb[:3] @ [0.299, 0.587, 0.114] for rgb in np.asarray(image.cmap(np.linspace(0, 1, 101)))]
    assert (np.diff(grey) > 0).all() and grey[-1] - grey[0] > 0.6
    for text in fig.axes[0].texts:  # numbers can be read: light on dark, dark on light
        column, row = map(int, text.get_position())
        behind = grey[round(float(image.get_array()[row, column]))]
        assert abs(behind - np.mean(to_rgba(text.get_color())[:3])) > 0.4, text.get_text()


def test_usage_is_a_share_of_each_tasks_selections(tmp_path, figures):
    plots.prompt_usage({"prompt_usage": [[30, 10, 0, 0], [0, 0, 0, 0], None, [1, 1, 1, 1]]}, tmp_path / "u.png")
    drawn = figures[0].axes[0].images[0].get_array()
    assert drawn[0].tolist() == [75, 25, 0, 0] and drawn[3].tolist() == [25, 25, 25, 25]
    assert np.ma.getmaskarray(drawn)[1:3].all()
    assert cells(figures[0])[0, 0] == "75"


def test_large_pools_have_no_numbers_and_few_ticks(tmp_path, figures):
    plots.prompt_usage(make_results(20, pool=100), tmp_path / "u.png")
    axes = figures[0].axes[0]
    assert not axes.texts and len(axes.get_xticks()) <= 25
    assert [t.get_text() for t in axes.get_xticklabels()][:3] == ["1", "5", "10"]


@pytest.mark.parametrize("tasks", tiny.some_of([1, 2, 10, 20], 10))
def test_no_text_overlaps_or_leaves_the_figure(tmp_path, figures, tasks):
    """Measured on the canvas: ticks, titles, labels and cell numbers of every figure."""
    plots.save_figures(with_heads(make_results(tasks, pool=30 if tasks > 5 else 10)), tmp_path)
    for name in ("a rather long label ", "fifteen letters"):
        runs = {f"{name}{k}": make_results(tasks, seed=k) for k in range(4)}
        plots.task_curves(runs, tmp_path / "m.png", panels=["forgetting", "drift"])
    assert [bool(fig.legends) for fig in figures[-2:]] == [True, False]
    for fig in figures:
        FigureCanvasAgg(fig).draw()
        boxes = []
        for axes in fig.axes:
            if not axes.axison:
                continue
            texts = [*axes.texts, axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
            texts += [*axes.get_xticklabels(), *axes.get_yticklabels()]
            low, high = sorted(axes.get_ylim())
            texts = [t for t in texts if t.get_text() and t.get_visible()]
            hidden = {
                t for t, y in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True) if not low <= y <= high
            }
            low, high = sorted(axes.get_xlim())
            hidden |= {
                t for t, x in zip(axes.get_xticklabels(), axes.get_xticks(), strict=True) if not low <= x <= high
            }
            boxes += [(t.get_text(), Text.get_window_extent(t)) for t in texts if t not in hidden]  # without arrows
        boxes += [(t.get_text(), t.get_window_extent()) for legend in fig.legends for t in legend.get_texts()]
        for text, box in boxes:
            assert fig.bbox.x0 - 1 <= box.x0 and box.x1 <= fig.bbox.x1 + 1, text
            assert fig.bbox.y0 - 1 <= box.y0 and box.y1 <= fig.bbox.y1 + 1, text
        for k, (text, box) in enumerate(boxes):
            for other, another in boxes[k + 1 :]:
                apart = box.x1 <= another.x0 + 1 or another.x1 <= box.x0 + 1
                assert apart or box.y1 <= another.y0 + 1 or another.y1 <= box.y0 + 1, (text, other)


def test_a_failed_save_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    path = tmp_path / "a.png"
    plots.accuracy_matrix(make_results(2), path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def cut(self, target, **kwargs):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", cut)
    with pytest.raises(OSError, match="disk full"):
        plots.accuracy_matrix(make_results(3), path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_new_file_takes_the_place_of_the_old_one(tmp_path):
    """Moved in, not written over: whoever has the old file open still reads it whole."""
    path = tmp_path / "a.png"
    plots.accuracy_matrix(make_results(2), path)
    before = path.read_bytes()
    os.link(path, tmp_path / "old.png")
    plots.accuracy_matrix(make_results(3), path)
    assert (tmp_path / "old.png").read_bytes() == before != path.read_bytes()


def test_pyplot_stays_out_of_it(tmp_path):
    before = "matplotlib.pyplot" in sys.modules
    plots.save_figures(make_results(2), tmp_path)
    assert ("matplotlib.pyplot" in sys.modules) == before


@pytest.mark.parametrize(
    ("draw", "results", "message"),
    [
        (plots.accuracy_matrix, {}, "no 'accuracy_matrix'"),
        (plots.accuracy_matrix, {"accuracy_matrix": [[1.0], [1.0, 2.0]]}, r"lengths \[1, 2\]"),
        (plots.task_curves, {}, "no run"),
        (partial(plots.task_curves, panels=["drift", "speed"]), make_results(2), "'speed'.*accuracy, forgetting"),
        (partial(plots.task_curves, panels=["drift"]), make_results(2) | {"drift": []}, "no values of drift"),
        (plots.task_curves, {"L2P": {"drift": [0.0]}}, "'L2P' has no 'accuracy_matrix'"),
        (plots.prompt_usage, make_results(2) | {"prompt_usage": None}, "no 'prompt_usage'"),
        (plots.prompt_usage, {"prompt_usage": [[1, -1]]}, "negative"),
    ],
)
def test_bad_input_is_named(tmp_path, draw, results, message):
    with pytest.raises(ValueError, match=message):
        draw(results, tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"\.png"):
        plots.accuracy_matrix(make_results(1), tmp_path / "x.pdf")
    assert not list(tmp_path.iterdir())


# ---- several runs ----------------------------------------------------------------------------------------------------


def test_bands_are_mean_and_deviation_and_a_single_task_is_a_level(tmp_path, figures):
    curves = {
        "a": [[90.0, 80.0, 70.0], [94.0, 82.0, 60.0]],
        "one seed": [[50.0, 40.0, 30.0]],
        "joint": [[88.0], [92.0]],
    }
    several.accuracy_bands({"L": curves, "S": {"a": curves["a"]}, "empty": {}}, tmp_path / "b.png")
    left, right = figures[0].axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in left.lines}
    assert drawn["a"] == [92, 81, 65] and drawn["one seed"] == [50, 40, 30] and set(drawn["joint"]) == {90}
    (band,) = left.collections  # of the only row with several seeds and tasks
    edges = band.get_paths()[0].vertices
    for place, mean, deviation in ((1, 92, 8**0.5), (3, 65, 50**0.5)):
        found = edges[edges[:, 0] == place][:, 1]
        assert found.min() == pytest.approx(mean - deviation) and found.max() == pytest.approx(mean + deviation)
    assert [line.get_label() for line in right.lines] == ["a"]
    assert right.lines[0].get_color() == left.lines[0].get_color()
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == list(drawn)


def test_bands_tell_ten_rows_apart_without_colour(tmp_path, figures):
    rows = {f"row {k}": [[50.0 + k, 40.0 + k]] for k in range(10)}
    several.accuracy_bands({"panel": rows}, tmp_path / "b.png")
    assert len({(line.get_marker(), str(line.get_linestyle())) for line in figures[0].axes[0].lines}) == 10


POINTS = {
    "max_images": {
        None: {"linear head": [40.0, 42.0], "statistics head": [55.0, 57.0], "drift": [0.1, 0.3]},
        200: {"linear head": [30.0], "statistics head": [45.0], "drift": [0.4]},
        50: {"linear head": [20.0], "statistics head": [35.0], "drift": [0.6]},
    },
    "probe_space": {
        "logits": {"linear head": [41.0], "drift": [0.2]},
        "features": {"linear head": [42.0], "drift": [0.1]},
    },
}


def test_sensitivity_has_a_column_a_setting(tmp_path, figures):
    several.sensitivity(POINTS, tmp_path / "s.png", {"max_images": None})
    linear, words, statistics, no_words, drift, drift_of_words = figures[0].axes
    assert [t.get_text() for t in linear.get_xticklabels()] == ["50", "200", "none"]
    assert [t.get_text() for t in words.get_xticklabels()] == ["features", "logits"]
    drawn = [[list(bar.lines[0].get_ydata()) for bar in axes.containers] for axes in (linear, words, statistics)]
    assert drawn == [[[20, 30, 41]], [[42, 41]], [[35, 45, 56]]] and not no_words.containers
    assert [axes.get_ylabel().split(":")[0] for axes in (linear, statistics)] == ["linear head", "statistics head"]
    (bar,) = drift.containers
    assert list(bar.lines[0].get_ydata()) == pytest.approx([0.6, 0.4, 0.2])
    spreads = [float(np.ptp(part[:, 1])) / 2 for part in bar.lines[2][0].get_segments()]
    assert spreads == pytest.approx([0, 0, 0.02**0.5])
    for axes in (linear, statistics, drift):
        ends = np.concatenate([segment[:, 1] for segment in axes.containers[0].lines[2][0].get_segments()])
        assert axes.get_ylim()[0] < ends.min() and ends.max() < axes.get_ylim()[1]
    assert drift.get_ylim() == drift_of_words.get_ylim() and drift.get_ylim()[0] <= 0
    marks = [[line for line in axes.lines if line.get_linewidth() == 5] for axes in (linear, drift, words)]
    assert [[line.get_xdata()[0] for line in lines] for lines in marks] == [[2], [2], []]
    assert not figures[0].legends  # each row of panels says what it shows


def test_figures_of_several_runs_keep_their_text_inside(tmp_path, figures):
    curves = {f"a rather long label {k}": [[50.0 + k] * 20, [51.0 + k] * 20] for k in range(9)}
    several.accuracy_bands({"method, linear head": curves, "method, statistics head": curves}, tmp_path / "b.png")
    several.sensitivity(POINTS, tmp_path / "s.png")
    for fig in figures:
        FigureCanvasAgg(fig).draw()
        texts = [text for legend in fig.legends for text in legend.get_texts()]
        for axes in filter(lambda axes: axes.axison, fig.axes):
            texts += [axes._left_title, axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels()]
        for text in texts:
            box = text.get_window_extent()
            inside = fig.bbox.x0 - 1 <= box.x0 and box.x1 <= fig.bbox.x1 + 1 and fig.bbox.y0 - 1 <= box.y0
            assert not text.get_text() or (inside and box.y1 <= fig.bbox.y1 + 1), text.get_text()


@pytest.mark.parametrize(
    ("draw", "message"), [(several.accuracy_bands, "no row"), (several.sensitivity, "no setting")]
)
def test_nothing_to_draw_is_named(tmp_path, draw, message):
    with pytest.raises(ValueError, match=message):
        draw({}, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_heads_of_long_names_need_no_legend_where_they_share_a_line(tmp_path):
    results = with_heads(make_results(3))
    results["heads"]["nearest mean of the classes' features"] = results["heads"].pop("statistics")
    assert len(plots.save_figures(results, tmp_path)) == 5


def measured(full: dict, here) -> dict:
    """The run again, in which the test images of task j were there after task i only where `here(i, j)`."""
    matrix = [
        [value if j > i or here(i, j) else None for j, value in enumerate(row)]
        for i, row in enumerate(full["accuracy_matrix"])
    ]
    tasks = len(matrix)
    shares = {
        name: [
            0 if i == 0 else value if any(here(i, j) for j in range(i)) else None for i, value in enumerate(full[name])
        ]
        for name in ("drift", "changed_selections")
    }
    usage = [row if here(tasks - 1, j) else None for j, row in enumerate(full["prompt_usage"])]
    found = {**full, "accuracy_matrix": matrix, **metrics.summarize(matrix, tasks), **shares, "finished_tasks": tasks}
    return {**found, "prompt_usage": usage if any(usage) else None}


def hatched(fig) -> set[tuple[int, int]]:
    """Cells of a heat-map that are hatched; a legend then says what that means."""
    found = set()
    for patch in fig.axes[0].patches:
        assert patch.get_hatch() and patch.get_height() == 1
        row, start = round(patch.get_y() + 0.5), round(patch.get_x() + 0.5)
        found |= {(row, start + k) for k in range(round(patch.get_width()))}
    assert [[text.get_text() for text in legend.get_texts()] for legend in fig.legends] == [["not measured"]] * bool(
        found
    )
    return found


ABSENT = {
    "nothing": lambda i, j: True,
    "the tasks before the third": lambda i, j: i < 2 or j >= 2,
    "the first task": lambda i, j: j > 0,
    "the last task": lambda i, j: i != 3 or j < 3,
    "all but each task's own": lambda i, j: i == j,
    "everything": lambda i, j: False,
}


@pytest.mark.parametrize("absent", ABSENT)
def test_what_was_not_measured_is_hatched_and_has_no_point(tmp_path, figures, absent):
    here, full = ABSENT[absent], make_results(4)
    results = measured(full, here)
    results = with_heads(results) if absent in ("the last task", "everything") else results
    written = [path.name for path in plots.save_figures(results, tmp_path)]
    drawn = dict(zip(written, figures, strict=True))
    below = {(i, j) for i in range(4) for j in range(i + 1)}
    gaps = {(i, j) for i, j in below if not here(i, j)}
    assert hatched(drawn["accuracy_matrix.png"]) == gaps and cells(drawn["accuracy_matrix.png"]).keys() == below - gaps
    if "prompt_usage.png" in written:
        rows = {j for j in range(4) if not here(3, j)}
        assert hatched(drawn["prompt_usage.png"]) == {(j, entry) for j in rows for entry in range(10)}
    averages = [all(here(i, j) for j in range(i + 1)) for i in range(4)]
    compared = [i > 0 and any(here(i, j) for j in range(i)) for i in range(4)]
    lost = [all(here(k, j) for k in range(4) for j in range(k) if k <= i) for i in range(4)]
    assert ("task_curves.png" in written) is any(averages)
    assert ("prompt_usage.png" in written) is (results["prompt_usage"] is not None)
    for fig in drawn.values():
        for title, own in lines(fig).items():
            for values in own.values():
                points = np.isfinite(values).tolist()
                assert any(points), "a panel without a point"
                if title.startswith("Average accuracy"):
                    assert points == averages
                elif title.startswith(("Drift", "Changed")):
                    assert points == [True, *compared[1:]] and any(points[1:])
                elif title.startswith("Forgetting"):
                    assert not any(point and not known for point, known in zip(points[1:], lost[1:], strict=True))
                else:
                    assert all(points)  # the rank needs no image
    assert ("Drift of old features (relative)" in lines(drawn["stability.png"])) is any(compared)


def test_runs_with_and_without_gaps_share_panels(tmp_path, figures):
    full = make_results(3)
    runs = {
        "whole": full,
        "goes on": measured(full, lambda i, j: i < 1 or j >= 1),
        "blind": measured(full, lambda i, j: False),
    }
    plots.task_curves(runs, tmp_path / "a.png")
    drawn = lines(figures[0])
    assert (
        list(drawn["Average accuracy (%)"]) == ["whole", "goes on"] and len(drawn["Protected rank (directions)"]) == 3
    )
    with pytest.raises(ValueError, match="no values of accuracy"):
        plots.task_curves({"blind": runs["blind"]}, tmp_path / "b.png", panels=["accuracy"])


@pytest.mark.parametrize("tasks", [1, 30])
def test_one_task_or_many_without_any_measured(tmp_path, figures, tasks):
    results = measured(make_results(tasks), lambda i, j: False)
    assert [path.name for path in plots.save_figures(results, tmp_path)] == plots.figure_names(results)
    assert hatched(figures[0]) == {(i, j) for i in range(tasks) for j in range(i + 1)}
    assert len(figures[0].axes[0].patches) == tasks  # one for each row, however many cells


# ---- what stands beside the tasks, and what the files hold -----------------------------------------------------------

MANIFEST = {"tasks": [{"classes": [0, 1]}, {"classes": [2, 3, 4]}, {"classes": [5, 0]}]}


def ticks(axes, which: str) -> list[str]:
    return [text.get_text() for text in getattr(axes, f"get_{which}ticklabels")()]


def test_numbers_of_classes_stand_beside_those_of_tasks():
    results = make_results(3)
    axes = plots.accuracy_matrix(results, manifest=MANIFEST).axes[0]
    assert ticks(axes, "x") == ["1\n(2)", "2\n(3)", "3\n(2)"] and ticks(axes, "y") == ["1 (2)", "2 (5)", "3 (6)"]
    for panel in plots.task_curves(results, manifest=MANIFEST).axes[:5]:
        assert ticks(panel, "x") == ["1\n(2)", "2\n(5)", "3\n(6)"]
        assert panel.get_xlabel() == "after task (classes known)"
    assert ticks(plots.prompt_usage(results, manifest=MANIFEST).axes[0], "y") == ["1 (2)", "2 (3)", "3 (2)"]
    assert ticks(plots.forgetting_by_task(results, manifest=MANIFEST).axes[0], "x") == ["1\n(2)", "2\n(3)"]
    assert ticks(plots.accuracy_matrix(results).axes[0], "y") == ["1", "2", "3"]


def test_forgetting_by_task_is_the_best_accuracy_before_and_the_one_now():
    matrix = [[90.0, None, None, None], [95.0, 80.0, None, None], [70.0, None, 60.0, None], [50.0, 85.0, None, 99.0]]
    axes = plots.forgetting_by_task({"accuracy_matrix": matrix}).axes[0]
    best, now = (dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in axes.lines)
    assert best == {1: 95, 2: 80} and now == {1: 50, 2: 85}  # the third was not measured at the end
    assert [text.get_text() for text in axes.texts] == ["\N{MINUS SIGN}45.0", "+5.0"]
    shapes = [(line.get_marker(), line.get_markerfacecolor()) for line in axes.lines]
    assert len({marker for marker, _ in shapes}) == 2  # told apart without colour
    with pytest.raises(ValueError, match="nothing can be drawn"):
        plots.forgetting_by_task({"accuracy_matrix": [[90.0, None], [None, 80.0]]})


def test_rows_that_trained_nothing_are_thin_grey_lines_among_those_of_runs():
    frozen = {f"frozen, {k}": {"accuracy_matrix": make_results(3, seed=k)["accuracy_matrix"]} for k in range(3)}
    frozen = {name: {**row, "drift": [0.0] * 3} for name, row in frozen.items()}
    runs = {
        name: {**make_results(3, seed=k), "method": "l2p"} for k, name in enumerate(("L2P", "L2P-PGP", "published"))
    }
    fig = plots.comparison({**frozen, **runs, "refused": {"refused": "why"}}, manifest=MANIFEST)
    panels = {axes.get_title(loc="left"): axes.lines for axes in fig.axes if axes.lines}
    names = {title: [line.get_label() for line in found] for title, found in panels.items()}
    assert names.pop("Average accuracy (%)") == names.pop("Forgetting (percentage points)") == [*runs, *frozen]
    assert len(names) == 3 and all(found == list(runs) for found in names.values())  # they have nothing that moves
    own, references = np.split(np.array(panels["Average accuracy (%)"]), [3])
    assert len({str(line._dash_pattern) for line in references}) == 3 and len({line.get_marker() for line in own}) == 3
    assert {line.get_marker() for line in references} == {""}
    assert max(line.get_linewidth() for line in references) < min(line.get_linewidth() for line in own)
    assert all(len({*to_rgba(line.get_color())[:3]}) == 1 for line in references)


def test_equal_content_gives_equal_bytes_and_no_date(tmp_path):
    for name in ("a", "b"):
        plots.accuracy_matrix(make_results(2), tmp_path / f"{name}.png")
    for suffix in (".png", ".svg"):
        one, other = ((tmp_path / name).with_suffix(suffix).read_bytes() for name in ("a", "b"))
        assert one == other and b"date" not in one.lower() and b"matplotlib version" not in one.lower()


def test_accuracy_and_forgetting_of_each_head_stand_side_by_side():
    curves = {
        "L2P": ([[90.0, 70.0], [94.0, 60.0]], [[0.0, 10.0], [0.0, 20.0]]),
        "L2P-PGP": ([[91.0, 80.0]], [[0.0, 5.0]]),
    }
    fig = several.accuracy_and_forgetting({"linear head": curves, "statistics head": {}}, known=[2, 4])
    accuracy, forgetting = fig.axes
    drawn = [{line.get_label(): list(line.get_ydata()) for line in axes.lines} for axes in fig.axes]
    assert drawn == [{"L2P": [92, 65], "L2P-PGP": [91, 80]}, {"L2P": [0, 15], "L2P-PGP": [0, 5]}]
    assert [len(axes.collections) for axes in fig.axes] == [1, 1] and ticks(accuracy, "x") == ["1\n(2)", "2\n(4)"]
    assert forgetting.get_title(loc="left") == "linear head: forgetting (percentage points)"
    with pytest.raises(ValueError, match="no row"):
        several.accuracy_and_forgetting({"linear head": {}})


def test_a_setting_without_values_of_a_series_has_no_panel():
    fig = several.sensitivity(POINTS)
    assert (
        [bool(axes.containers) for axes in fig.axes]
        == [axes.axison for axes in fig.axes]
        == [True] * 3 + [False] + [True] * 2
    )
