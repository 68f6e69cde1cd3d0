"""Figures without a screen, closed after each test, and drawn for what only shows then."""

from collections.abc import Callable, Iterator

import matplotlib
import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture
def overlapping() -> Callable[[Figure], list[tuple[str, str]]]:
    """Find tick labels that overlap once the figure is drawn."""

    def find(figure: Figure) -> list[tuple[str, str]]:
        figure.draw_without_rendering()
        renderer = figure.canvas.get_renderer()
        found = []
        for axes in figure.axes:
            for axis in (axes.xaxis, axes.yaxis):
                labels = [label for label in axis.get_ticklabels() if label.get_text()]
                boxes = [label.get_window_extent(renderer) for label in labels]
                found += [
                    (labels[n].get_text(), labels[n + 1].get_text())
                    for n in range(len(labels) - 1)
                    if boxes[n].overlaps(boxes[n + 1])
                ]
        return found

    return find
