"""
Which modules carry the signal
==============================

Which modules does a model read its predictions from? Permutation importance says so: the updates of
one module are swapped between adapters, and the score is computed once more. What it loses is the
module's importance. Factors and rank are swapped together, so that updates stay whole.
"""

from sklearn.linear_model import RidgeCV
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklora import SVDSpectrum
from sklora.datasets import load_digits_loras
from sklora.inspection import ModuleImportanceDisplay, module_importance

zoo = load_digits_loras()
X, X_test, y, y_test = train_test_split(zoo.data, zoo.size, random_state=0)
model = make_pipeline(SVDSpectrum(), StandardScaler(), RidgeCV()).fit(X, y)
print(f"number of training images, R2 on held-out adapters: {model.score(X_test, y_test):.2f}")

# %%
# Module by module
# ----------------
# The adapters are held out, because what a model has learnt by heart is not of interest. A bar is
# the mean over ten permutations, with the standard deviation.

display = ModuleImportanceDisplay.from_estimator(
    model, X_test, y_test, n_repeats=10, random_state=0
)

# %%
# Block by block
# --------------
# Modules of one block tell much the same. Where one is spoilt the others can stand in for it, so
# each looks less important than they are together. So permute whole blocks at once.

display = ModuleImportanceDisplay.from_estimator(
    model, X_test, y_test, by="depth", n_repeats=10, random_state=0
)

# %%
# The numbers
# -----------
# The display draws what a function computes. Its result has the form of that of
# :func:`sklearn.inspection.permutation_importance`.

result = module_importance(model, X_test, y_test, scoring="neg_mean_absolute_error", random_state=0)
for place in result.importances_mean.argsort()[::-1][:5]:
    mean, spread = result.importances_mean[place], result.importances_std[place]
    print(f"{result.names[place]:20} {mean:.3f} ± {spread:.3f} images")
