"""
A map of a zoo
==============

Each point is an adapter, and adapters with similar updates are neighbours. Such maps show at once
what a zoo is made of: families, copies, and adapters that belong elsewhere.
"""

import numpy as np
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklora import LoRACollection, SVDSpectrum
from sklora.datasets import load_digits_loras
from sklora.inspection import ZooMapDisplay

zoo = load_digits_loras()
X = zoo.data

# %%
# By direction
# ------------
# The cosine between the updates of two adapters says whether they push the model the same way,
# however far. Its first principal component has found something of a digit, although nobody told it
# which adapters had seen one: seven in ten of those that were trained on a 4 are on one side, and
# three in ten of the others.

digit = np.where(zoo.presence[:, 4], "with a 4", "without")
display = ZooMapDisplay.from_loras(X, digit, label_name="trained")

# %%
# The component's share of the variance is small. Each update of this zoo starts from random factors
# of its own, so most of what it is belongs to it alone.
#
# By size
# -------
# Any transformer gives a map. Spectra forget the directions of the updates and keep their sizes,
# which tell how many images an adapter was trained on.

spectra = make_pipeline(SVDSpectrum(), StandardScaler(), PCA(2, random_state=0)).fit(X)
display = ZooMapDisplay.from_estimator(spectra, X, zoo.size, label_name="training images")

# %%
# Families
# --------
# People finetune each other's adapters and upload the result. Here are three families: an adapter
# and 30 descendants, whose weights differ from its own by as much as from zero. They lie together.

rng = np.random.default_rng(0)
parents = np.repeat([5, 50, 500], 30)
flat = X.read(parents)
noise = rng.normal(size=flat.shape).astype(flat.dtype) * flat.std(axis=1, keepdims=True)
family = LoRACollection.from_array(flat + noise, X.layout, ranks=X.ranks[parents])
display = ZooMapDisplay.from_loras(family, X.ids[parents], label_name="descends from")
