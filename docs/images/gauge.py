"""Draw ``gauge.svg``: two pairs of factors, one update. ::

python docs/images/gauge.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

# The same bytes whenever it is drawn.
plt.rcParams.update({"svg.hashsalt": "sklora", "svg.fonttype": "path", "font.size": 11})

rng = np.random.default_rng(3)
U, V = rng.normal(size=(8, 2)), rng.normal(size=(6, 2))
R = np.array([[0.3, 1.1], [-0.9, 0.6]])
pairs = {
    "an adapter": (("U", U), ("Vᵀ", V.T)),
    "the same, in another gauge": (("U R", U @ R), ("(V R⁻ᵀ)ᵀ", np.linalg.inv(R) @ V.T)),
}
widths = [1.6, 0.9, 4.6, 0.9, 4.6, 1.4, 5.4]
figure, axes = plt.subplots(
    2,
    len(widths),
    figsize=(7.4, 4.7),
    gridspec_kw={"width_ratios": widths, "wspace": 0.12, "hspace": 0.5},
    facecolor="white",
)


def draw_matrix(axis, matrix, name):
    axis.pcolormesh(matrix[::-1], cmap="cividis", vmin=-1.8, vmax=1.8, edgecolor="white", lw=0.8)
    axis.set(aspect="equal", xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    axis.set_title(name, fontsize=11, pad=5)


def write_sign(axis, sign):
    axis.axis("off")
    axis.text(0.5, 0.5, sign, ha="center", va="center", fontsize=16)


for row, (title, ((left_name, left), (right_name, right))) in zip(axes, pairs.items(), strict=True):
    draw_matrix(row[0], left, left_name)
    write_sign(row[1], "·")
    draw_matrix(row[2], right, right_name)
    write_sign(row[3], "=")
    draw_matrix(row[4], left @ right, "ΔW")
    write_sign(row[5], "→")
    spectrum = np.linalg.svd(left @ right, compute_uv=False)[:2]
    row[6].bar(["1st", "2nd"], spectrum, width=0.55, color="#00224e")
    row[6].set_title("singular values", fontsize=11, pad=5)
    row[6].set(yticks=[], ylim=(0, 1.1 * spectrum[0]), box_aspect=0.9)
    row[6].spines[["top", "right", "left"]].set_visible(False)
    row[0].text(
        0, 1.22, title, transform=row[0].transAxes, fontsize=12, fontweight="bold", va="bottom"
    )

figure.savefig(Path(__file__).with_name("gauge.svg"), bbox_inches="tight", metadata={"Date": None})
