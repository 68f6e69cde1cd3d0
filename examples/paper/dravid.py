"""Principal components of weight space, and edits along them: Dravid et al., arXiv 2406.09413.

Principal components of the training adapters' updates are a space in which a linear classifier
tells whether a class was trained on. Held-out adapters without the class are moved along the
normal of its plane, as far as to where the average adapter with the class is, and each update is
cut to a rank again. Whether this teaches the class is seen by running the edited adapters: their
loss on held-out images of the class, and the class of the images that they draw. Beside it stands
an equally long step in a random direction of the same space, and adapters that did train on the
class. The standard error is that of the mean over the ten classes.

    python examples/paper/dravid.py --output dravid.json
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import protocol
import torch
from numpy.typing import NDArray
from protocol import Answer
from sklearn.decomposition import PCA
from sklearn.linear_model import RidgeClassifier

from sklora import DenseProduct, LoRACollection, LoRALayout
from sklora.datasets import evaluate_digits_loras

N_COMPONENTS = (32, 128, 512)
N_EDITED = 64  # held-out adapters of each class, at most
RANKS = (4, 16)
Array = NDArray[np.floating]


def dense(X: LoRACollection) -> Array:
    """Give the entries of all updates, ``(n_adapters, sum of n m)``."""
    return DenseProduct().fit_transform(X)


def low_rank(updates: Array, layout: LoRALayout, rank: int) -> LoRACollection:
    """Give the best adapters of a rank for updates as `dense` gives them."""
    shapes = [(module.n, module.m) for module in layout.modules]
    ends = np.cumsum([n * m for n, m in shapes])
    factors, ranks = [], []
    for part, shape in zip(np.split(updates, ends[:-1], axis=1), shapes, strict=True):
        matrices = torch.from_numpy(np.ascontiguousarray(part)).view(-1, *shape)
        U, s, Vh = torch.linalg.svd(matrices, full_matrices=False)
        root = s[:, None, :rank].sqrt()
        factors += [U[:, :, :rank] * root, Vh.mT[:, :, :rank] * root]
        ranks.append(root.shape[2])
    flat = torch.cat([factor.flatten(1) for factor in factors], dim=1).numpy()
    return LoRACollection.from_array(flat, layout.with_ranks(ranks))


@dataclass
class WeightSpace:
    """Principal components, whitened, and a plane for each class."""

    components: PCA
    planes: RidgeClassifier

    def scores(self, updates: Array) -> Array:
        """Give the place of updates relative to every plane, ``(n_adapters, n_classes)``."""
        return self.planes.decision_function(self.components.transform(updates))

    def step(self, direction: Array) -> Array:
        """Give the updates that a direction of the space stands for."""
        return (direction * np.sqrt(self.components.explained_variance_)) @ (
            self.components.components_
        )

    def to_plane(self, updates: Array, label: int, place: float) -> Array:
        """Give what moves updates along the normal of a plane to a place relative to it."""
        normal = self.planes.coef_[label]
        missing = place - self.scores(updates)[:, label]
        return np.outer(missing / (normal @ normal), self.step(normal)).astype(updates.dtype)


def fit(updates: Array, presence: NDArray[np.int64], n_components: int) -> WeightSpace:
    """Fit components and planes to training adapters."""
    n_components = min(n_components, len(updates) - 1, updates.shape[1])
    components = PCA(n_components, whiten=True, svd_solver="randomized", random_state=0)
    places = components.fit_transform(updates)
    return WeightSpace(components, RidgeClassifier().fit(places, presence))


def choose(updates: Array, presence: NDArray[np.int64], rows: protocol.Split) -> WeightSpace:
    """Take the number of components that tells the classes of the validation adapters best."""

    def accuracy(space: WeightSpace) -> float:
        found = space.scores(updates[rows.validation]) > 0
        return protocol.label_accuracy(presence[rows.validation], found)

    return max(
        (fit(updates[rows.train], presence[rows.train], n) for n in N_COMPONENTS), key=accuracy
    )


def measure(space: WeightSpace, X: LoRACollection, base: dict, label: int) -> dict[str, float]:
    """Run adapters, and say what they know of a class."""
    result = evaluate_digits_loras(X, base, verbose=0)
    return {
        "said to have the class": float((space.scores(dense(X))[:, label] > 0).mean()),
        "loss of the class": float(result.class_losses[:, label].mean()),
        "loss of the others": float(np.delete(result.class_losses, label, axis=1).mean()),
        "samples of the class": float(result.class_probabilities[:, label].mean()),
    }


def edit(
    space: WeightSpace, zoo: protocol.Bunch, updates: Array, rows: protocol.Split, label: int
) -> dict[str, dict[str, float]]:
    """Teach a class to held-out adapters that were not trained on it, and measure what they do."""
    has = zoo.presence[:, label] == 1
    plain = rows.test[~has[rows.test]][:N_EDITED]
    place = space.scores(updates[rows.train[has[rows.train]]])[:, label].mean()
    move = space.to_plane(updates[plain], label, place)
    aside = space.step(np.random.default_rng(label).normal(size=space.planes.coef_.shape[1]))
    lengths = np.linalg.norm(move, axis=1) / np.linalg.norm(aside)
    steps = {"moved": move, "moved at random": np.outer(lengths, aside).astype(move.dtype)}
    adapters = {
        "without the class": zoo.data[plain],
        **{
            f"{name}, rank {rank}": low_rank(updates[plain] + step, zoo.data.layout, rank)
            for name, step in steps.items()
            for rank in RANKS
        },
        "with the class": zoo.data[rows.test[has[rows.test]][:N_EDITED]],
    }
    return {name: measure(space, X, zoo.base, label) for name, X in adapters.items()}


def main(argv: Sequence[str] | None = None) -> dict:
    """Edit adapters of every class and make the table."""
    run = protocol.Run(protocol.parser(__doc__).parse_args(argv))
    zoo = run.zoo("digits")
    rows = protocol.split(len(zoo.data), zoo.groups)
    updates = dense(zoo.data)
    space = choose(updates, zoo.presence, rows)
    found = space.scores(updates[rows.test]) > 0
    accuracy = protocol.label_accuracy(zoo.presence[rows.test], found)
    n_components = len(space.components.components_)
    print(f"{n_components} components; classes of test adapters, accuracy {accuracy:.3f}")
    answers: dict[str, Answer] = {}
    for label in range(zoo.presence.shape[1]):
        for name, values in edit(space, zoo, updates, rows, label).items():
            scores = answers.setdefault(name, Answer()).scores
            for key, value in values.items():
                scores.setdefault(key, []).append(value)
    run.keep("edits", answers, n_components=n_components, accuracy=accuracy)
    return run.finish()


if __name__ == "__main__":
    main()
