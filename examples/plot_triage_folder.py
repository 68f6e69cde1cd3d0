"""
Triage a folder of adapter files
================================

A folder of LoRA adapters has arrived, and running each of them takes long. Which should be looked
at first? A model that reads weights scores each file in milliseconds, without the base model. This
page goes from files to a CSV in which every file has a line: a predicted loss, or the reason why
there is none.

The model here is for adapters of the denoiser of the bundled zoo, and refuses others. For your own
folder, train one on adapters of your base model whose quality you know. The commands ``sklora fit``
and ``sklora predict`` go the same way.

Needs pandas: ``pip install -c constraints.txt pandas`` in a clone of the repository.
"""

# %%
# Two folders
# -----------
# The bundled LoRAs are written as PEFT files, into two folders. A third of them have just arrived.
# The quality of the others has been measured: it is the mean squared error of denoising, on images
# that no adapter was trained on. Two more files arrive: one whose download broke off, and one for
# another base model.

import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.metrics import mean_absolute_error, r2_score
from sklearn.model_selection import KFold, cross_val_score, train_test_split

from sklora import make_architecture
from sklora.datasets import load_digits_loras
from sklora.io import SkippedAdapterWarning, read_adapters, scan_adapters, write_adapter

temporary = tempfile.TemporaryDirectory()
measured, arrived = Path(temporary.name) / "measured", Path(temporary.name) / "arrived"

zoo = load_digits_loras()
old, new = train_test_split(np.arange(len(zoo.data)), test_size=1 / 3, random_state=0)
for folder, rows in ((measured, old), (arrived, new)):
    for row in rows:
        write_adapter(folder / f"digits-{row:04d}", zoo.data[row], base_model="digits-denoiser")
write_adapter(arrived / "portrait", {"unet.to_q": (np.ones((8, 2)), np.ones((6, 2)))},
              base_model="another-denoiser")  # fmt: skip
whole = (arrived / f"digits-{new[0]:04d}" / "adapter_model.safetensors").read_bytes()
(arrived / "broken-off").mkdir()
(arrived / "broken-off" / "adapter_model.safetensors").write_bytes(whole[:10_000])

loss = {f"digits-{row:04d}": zoo.loss[row] for row in range(len(zoo.data))}

# %%
# A model for files
# -----------------
# ``read_adapters`` reads headers now and weights when they are needed. An adapter's id is its path.
# The spread is over five folds of the measured adapters. A constant prediction has an R2 of 0 at
# best.

X = read_adapters(measured)
y = np.array([loss[Path(id).parent.name] for id in X.ids])
model = make_architecture("svd", "regression", random_state=0)
scores = cross_val_score(model, X, y, cv=KFold(5, shuffle=True, random_state=0))
print(f"{X}\nR2 {scores.mean():.2f} ± {scores.std(ddof=1):.2f}")
model.fit(X, y)

# %%
# What is in the folder
# ---------------------
# ``scan_adapters`` looks at headers alone and never raises for a bad file. Its reports make a
# table.

reports = pd.DataFrame(
    [vars(report) | {"ranks": report.ranks} for report in scan_adapters(arrived)]
)
overview = reports.groupby(["format", "base_model", "ranks"], dropna=False).size()
print(overview.to_string())

# %%
# ``read_adapters`` with the model's layout takes the files that fit it: the same modules, of the
# same base model. With ``on_error="skip"`` it leaves out the others, and its warning holds the
# reasons.

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", SkippedAdapterWarning)
    incoming = read_adapters(arrived, layout=X.layout, on_error="skip")
skipped = {error.path: error.reason for warning in caught for error in warning.message.errors}
for path, reason in skipped.items():
    print(f"{Path(path).relative_to(arrived)}: {reason}\n")

# %%
# Scores, and a CSV
# -----------------
# The largest predicted loss comes first, and what could not be read comes last, with its reason.

table = pd.concat(
    [
        pd.DataFrame({"path": incoming.ids, "predicted_loss": model.predict(incoming)}),
        pd.DataFrame({"path": skipped.keys(), "error": skipped.values()}),
    ]
).sort_values("predicted_loss", ascending=False)
table["path"] = [Path(path).relative_to(arrived).as_posix() for path in table["path"]]
csv = Path(temporary.name) / "triage.csv"
table.to_csv(csv, index=False, float_format="%.4f")
print(*csv.read_text().splitlines()[:6], "...", sep="\n")

# %%
# Was it worth it?
# ----------------
# The losses of the files that arrived are known here, and were kept from the model. So the order
# can be judged: of the tenth that the triage would look at first, how many are truly in the worst
# tenth? Picking at random finds a tenth of them.

table["measured_loss"] = [loss.get(Path(path).parts[0]) for path in table["path"]]
known = table.dropna(subset=["predicted_loss", "measured_loss"])
truth = known["measured_loss"]
n_first = len(known) // 10
first = known["predicted_loss"].rank(ascending=False) <= n_first
worst = truth.rank(ascending=False) <= n_first
found, by_chance = (first & worst).sum(), n_first**2 / len(known)
print(f"of {len(known)} files, {n_first} are looked at first")
print(f"{found} of them are of the worst {n_first}; at random, {by_chance:.1f} would be")
constant = np.full(len(known), y.mean())
for name, predicted in {"model": known["predicted_loss"], "constant": constant}.items():
    error, r2 = mean_absolute_error(truth, predicted), r2_score(truth, predicted)
    print(f"{name:10} mean error {error:.4f}, R2 {r2:.2f}")

# %%
# Each mark is a file. On the dashed line, prediction and measurement agree; above the dotted line
# is the worst tenth.

figure, axis = plt.subplots(figsize=(6.5, 4.6), layout="constrained")
styles = {"looked at first": (first, "^", "#D55E00"), "later": (~first, "o", "#56B4E9")}
for label, (chosen, marker, color) in styles.items():
    axis.scatter(
        known["predicted_loss"][chosen], truth[chosen], s=28, marker=marker, color=color,
        edgecolor="0.2", linewidth=0.4, label=f"{label} ({chosen.sum()} files)",
    )  # fmt: skip
ends = [known["predicted_loss"].min(), known["predicted_loss"].max()]
axis.plot(ends, ends, "--", color="0.3", linewidth=1)
axis.axhline(truth[worst].min(), color="0.3", linewidth=1, linestyle=":")
axis.set(xlabel="predicted loss", ylabel="measured loss")
axis.legend(frameon=False, loc="upper left")
axis.spines[["top", "right"]].set_visible(False)
plt.show()

temporary.cleanup()
