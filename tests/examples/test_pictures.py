"""The pictures of the guides are drawn by their scripts."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from tiny import script

PICTURES = Path(__file__).parents[2] / "examples" / "guides" / "pictures"


def test_the_mechanism_is_drawn_inside_its_picture(monkeypatch):
    with script(PICTURES / "mechanism.py") as module:
        drawn = []
        monkeypatch.setattr(module, "save", lambda fig, path: drawn.append((fig, path)))
        module.main()
    ((fig, path),) = drawn
    assert path.is_file() and path.with_suffix(".svg").is_file()  # as committed
    FigureCanvasAgg(fig).draw()
    texts = [text for axes in fig.axes for text in axes.texts]
    assert len(texts) > 15
    for text in texts:
        box = text.get_window_extent()
        assert min(box.x0, box.y0) >= 0 and box.x1 <= fig.bbox.x1 and box.y1 <= fig.bbox.y1, text.get_text()
