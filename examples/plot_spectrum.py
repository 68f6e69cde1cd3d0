"""
Spectra of updates
==================

How strongly does an adapter change each module, and in how many directions? The singular values of
the updates ``U V^T`` say so. They belong to the update: whoever wrote the same update with other
factors gets the same picture.
"""

import matplotlib.pyplot as plt
import numpy as np

from sklora import SVDSpectrum
from sklora.datasets import load_digits_loras
from sklora.inspection import SpectrumDisplay
from sklora.testing import apply_gauge

zoo = load_digits_loras()
X = zoo.data

# %%
# One adapter
# -----------
# A row is a module, a column a singular value, and the scale of the colours is logarithmic.

display = SpectrumDisplay.from_loras(X[0])
display.ax_.set_title(f"an adapter trained on {zoo.size[0]} images")

# %%
# A zoo
# -----
# Of many adapters, the heat map shows the median. In this zoo the largest singular values are those
# of the keys and of the feed-forward layers that widen, ``mlp.up``.

display = SpectrumDisplay.from_loras(X)

# %%
# The same as curves: a thin line is a module, the darker the earlier in the model. The band holds
# the middle four fifths of all modules and adapters.

display = SpectrumDisplay.from_loras(X, kind="decay")

# %%
# Few images and many
# -------------------
# To compare, draw on existing axes. Adapters that were trained on one image change the model more
# than those that were trained on nine, in nearly every direction.

figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
for ax, size in zip(axes, (1, 9), strict=True):
    SpectrumDisplay.from_loras(X[zoo.size == size], kind="decay", ax=ax)
    ax.set_title(f"trained on {size} image{'s' if size > 1 else ''}")

# %%
# The gauge does not show
# -----------------------
# Here are the same updates with other factors, ``U R`` and ``V R^-T``. The factors change; up to
# rounding, the singular values do not.

few = X[:50]
same = apply_gauge(few, random_state=0)
spectra = SVDSpectrum().fit(few)
change = np.abs(spectra.transform(same) - spectra.transform(few)).max()
print(f"largest change of a weight:         {np.abs(same.read() - few.read()).max():.1e}")
print(f"largest change of a singular value: {change:.1e}")
