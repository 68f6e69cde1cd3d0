"""Dataset size recovery by nearest neighbours: Salama et al., arXiv 2406.19395.

The singular values of each module's update ask the training adapters for the nearest of them, which
names its number of images; the modules then vote. Beside it stands one neighbour in the singular
values of all modules at once. Nothing here is chosen or drawn, so that there are no seeds: the
standard error is that of the mean over the sets of classes that are tested, of two adapters each.

    python examples/paper/salama.py --output salama.json
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import protocol
from numpy.typing import NDArray
from scipy.stats import mode
from sklearn.neighbors import KNeighborsClassifier

from sklora import SVDSpectrum


def nearest(
    train: NDArray[np.floating], sizes: NDArray[np.int64], test: NDArray[np.floating]
) -> NDArray[np.int64]:
    """Give the size of the nearest training adapter."""
    return KNeighborsClassifier(n_neighbors=1).fit(train, sizes).predict(test)


def recover(zoo: protocol.Bunch) -> dict[str, NDArray[np.int64]]:
    """Predict the sizes of the test adapters from all others, which nothing is chosen on."""
    rows = protocol.split(len(zoo.data), zoo.groups)
    known = np.concatenate([rows.train, rows.validation])
    spectra = SVDSpectrum().fit(zoo.data[known])
    train, test = spectra.transform(zoo.data[known]), spectra.transform(zoo.data[rows.test])
    modules = np.split(np.arange(train.shape[1]), np.cumsum(spectra.n_values_)[:-1])
    votes = [nearest(train[:, some], zoo.size[known], test[:, some]) for some in modules]
    sizes, counts = np.unique(zoo.size[known], return_counts=True)
    return {
        "(blind)": np.full(len(test), sizes[counts.argmax()]),
        "vote of the modules": mode(votes, axis=0).mode,
        "all modules at once": nearest(train, zoo.size[known], test),
    }


def by_set(values: NDArray[Any], groups: NDArray[np.int64]) -> list[float]:
    """Give the mean over the adapters of each set, which are no independent samples."""
    _, sets, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    return (np.bincount(sets, weights=values) / sizes).tolist()


def main(argv: Sequence[str] | None = None) -> dict:
    """Make the table."""
    run = protocol.Run(protocol.parser(__doc__).parse_args(argv))
    for rank in (4, 32):
        zoo = run.zoo("digits", rank)
        test = protocol.split(len(zoo.data), zoo.groups).test
        true, groups = zoo.size[test], zoo.groups[test]
        run.keep(
            f"size, rank {rank}",
            {
                name: protocol.Answer(
                    scores={
                        "accuracy": by_set(predicted == true, groups),
                        "error in images": by_set(np.abs(predicted - true), groups),
                    }
                )
                for name, predicted in recover(zoo).items()
            },
            test_adapters=len(true),
        )
    return run.finish()


if __name__ == "__main__":
    main()
