import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_rgb

from sklora.inspection import (
    ArchitectureComparisonDisplay,
    ModuleImportanceDisplay,
    SpectrumDisplay,
    TrainingCurveDisplay,
    ZooMapDisplay,
)
from sklora.inspection._plotting import (
    COLORMAP,
    MARKERS,
    PALETTE,
    ending_of,
    plain_labels,
    room_for_labels,
    save_figure,
    short_names,
    windowless_axes,
)

DISPLAYS = {
    "architectures": ArchitectureComparisonDisplay(scores={"loss": {"svd": np.array([0.5, 0.7])}}),
    "importance": ModuleImportanceDisplay(importances=np.ones((2, 3)), names=["a", "b"]),
    "spectrum": SpectrumDisplay(values=np.ones((1, 2, 3)), module_names=["a", "b"]),
    "training": TrainingCurveDisplay(train_losses=[2, 1], valid_losses=[3, 2]),
    "map": ZooMapDisplay(points=np.eye(2)),
}


def luminance(color):
    """Of a colour in sRGB, as greyscale printing has it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return np.dot(linear, (0.2126, 0.7152, 0.0722))


def lightness(color):
    return 116 * np.cbrt(luminance(color)) - 16


class TestColours:
    def test_the_first_categories_differ_in_greyscale(self):
        shades = np.sort([lightness(color) for color in PALETTE[:4]])
        assert np.diff(shades).min() > 8

    def test_every_category_has_a_marker_of_its_own(self):
        assert len(set(MARKERS)) == len(MARKERS) == len(set(PALETTE)) == len(PALETTE)

    def test_the_map_of_numbers_gets_ever_lighter(self):
        shades = [luminance(color) for color in colormaps[COLORMAP](np.linspace(0, 1, 64))[:, :3]]
        assert (np.diff(shades) > 0).all()


class TestShortNames:
    def test_common_components(self):
        names = ["m.layers.0.q", "m.layers.10.q", "m.layers.10.v"]
        assert short_names(names) == ("m.layers.", ["0.q", "10.q", "10.v"])

    def test_one_name_keeps_its_last_component(self):
        assert short_names(["m.layers.0.q"]) == ("m.layers.0.", ["q"])

    def test_no_name_is_left_empty(self):
        assert short_names(["m", "m.q"]) == ("", ["m", "m.q"])

    def test_long_names_keep_both_ends(self):
        _, [name, _] = short_names(["begin" + 50 * "x" + "end", "y"])
        assert len(name) == 39
        assert short_names([40 * "x", "y"])[1][0] == 40 * "x"
        assert name.startswith("begin")
        assert name.endswith("end")


def test_figures_of_a_size_that_no_window_shows(tmp_path):
    ax = windowless_axes("test", (3, 2))
    assert ax.figure.get_layout_engine() is not None  # else labels are cut off
    assert plt.get_fignums() == []
    for name, start in (("a.PNG", b"\x89PNG"), ("b", b"\x89PNG"), ("c.pdf", b"%PDF")):
        save_figure(ax.figure, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    (tmp_path / "link").symlink_to("b")
    save_figure(ax.figure, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert plt.imread(tmp_path / "a.PNG").shape[:2] == (300, 450)


def test_names_are_no_mathematics():
    _, ax = plt.subplots()
    plain_labels(ax.yaxis, [0, 1], ["$x_1^$", "b"])
    ax.figure.draw_without_rendering()
    assert ax.get_yticklabels()[0].get_text() == "$x_1^$"


@pytest.mark.parametrize("display", DISPLAYS.values(), ids=DISPLAYS)
class TestEveryDisplay:
    def test_new_figure(self, display):
        assert display.plot() is display
        assert display.figure_ is plt.gcf()
        assert display.ax_.figure is display.figure_
        assert display.figure_.get_layout_engine() is not None  # else labels are cut off

    def test_given_axes(self, display):
        figure, (ax, other) = plt.subplots(1, 2)
        display.plot(ax)
        assert display.ax_ is ax
        assert display.figure_ is figure
        assert plt.get_fignums() == [figure.number]
        assert not other.has_data()

    def test_subfigure(self, display):
        part, _ = plt.figure(layout="constrained").subfigures(1, 2)
        display.plot(part.subplots())
        assert display.figure_ is part
        part.figure.draw_without_rendering()

    def test_without_pyplot(self, display, monkeypatch):
        from matplotlib.figure import Figure

        monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
        display.plot(Figure().subplots())
        assert display.ax_.has_data()

    def test_without_matplotlib(self, display, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ImportError, match=r"Display\.plot requires .* 'sklora\[plot\]'"):
            display.plot()


def test_import_needs_no_matplotlib():
    code = "import sys, sklora.inspection; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("height", "dpi", "room"), [(2, 50, 12), (2, 200, 12), (0.1, 100, 2)])
def test_room_for_labels_is_that_of_the_height(height, dpi, room):
    axes = plt.figure(figsize=(9, height), dpi=dpi).add_axes((0, 0, 1, 1))
    assert room_for_labels(axes, 9) == room


def test_figures_have_a_place(tmp_path):
    assert ending_of(tmp_path / "a.b.PNG") == "png"
    with pytest.raises(ValueError, match=f"path='{tmp_path}' is a folder"):
        save_figure(plt.figure(), tmp_path)
