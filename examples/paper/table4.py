"""Table 4 and appendix D.3: how many images was an adapter trained on?

Adapters of the digits, of rank 4 and of rank 32 as in the paper, were trained on one image of each
class of a set, so their number is that of the classes. It is predicted directly, and by the
class-sum strategy: predict which classes are there, and count them. If every class is wrong with
probability 1 - p, whatever the others are, the count of s of K classes is right when as many are
missed as are seen in error:

    P(s) = sum_j C(s, j) C(K - s, j) (1 - p)^(2 j) p^(K - 2 j)

averaged over the sizes of the test adapters. This is our derivation of what equation 38 of the
paper expresses. Classes differ, and so do the two kinds of error: beside it stands the same with a
rate for every class and kind. What remains between that and the observed accuracy is that errors
depend on one another, as far as it is more than another draw of test adapters would change.

    python examples/paper/table4.py --n-jobs 2 --output table4.json
"""

from collections.abc import Mapping, Sequence
from math import comb

import numpy as np
import protocol
from numpy.typing import ArrayLike, NDArray
from protocol import Answer, Question


def count_accuracy(p: float, sizes: ArrayLike, n_classes: int = 10) -> float:
    """How often the number of predicted classes is right, by equation 38.

    Parameters
    ----------
    p : float
        How often one class is right.
    sizes : array-like of int of shape (n_adapters,)
        True numbers of classes.
    n_classes : int, default=10

    Returns
    -------
    float
    """
    found, counts = np.unique(sizes, return_counts=True)
    chances = [
        sum(
            comb(s, j) * comb(n_classes - s, j) * (1 - p) ** (2 * j) * p ** (n_classes - 2 * j)
            for j in range(min(s, n_classes - s) + 1)
        )
        for s in found.tolist()
    ]
    return float(np.average(chances, weights=counts))


def count_accuracy_by_class(presence: NDArray[np.int64], wrong: NDArray[np.float64]) -> float:
    """How often the number of predicted classes is right, where error rates differ.

    Parameters
    ----------
    presence : ndarray of int of shape (n_adapters, n_classes)
        The true classes.
    wrong : ndarray of shape (n_adapters, n_classes)
        How often each is wrong; errors do not depend on one another.

    Returns
    -------
    float
    """
    n_adapters, n_classes = presence.shape
    # Chances of the difference between predicted and true count, -n_classes to n_classes.
    chances = np.zeros((n_adapters, 2 * n_classes + 1))
    chances[:, n_classes] = 1.0
    for present, rate in zip(presence.T == 1, wrong.T[:, :, None], strict=True):
        moved = np.where(
            present[:, None], np.roll(chances, -1, axis=1), np.roll(chances, 1, axis=1)
        )
        chances = (1 - rate) * chances + rate * moved
    return float(chances[:, n_classes].mean())


def class_sum(presence: NDArray[np.int64], predicted: NDArray[np.int64]) -> float:
    """Give the accuracy of the predicted number of classes."""
    return float(np.mean(presence.sum(axis=1) == predicted.sum(axis=1)))


def equation_38(presence: NDArray[np.int64], predicted: NDArray[np.int64]) -> float:
    """Give what that accuracy would be if all classes were right as often, by chance."""
    right = float(np.mean(presence == predicted))
    return count_accuracy(right, presence.sum(axis=1), presence.shape[1])


def beyond_equation_38(presence: NDArray[np.int64], predicted: NDArray[np.int64]) -> float:
    """Give by how much the accuracy is above that."""
    return class_sum(presence, predicted) - equation_38(presence, predicted)


def by_class(presence: NDArray[np.int64], predicted: NDArray[np.int64]) -> float:
    """Give what the accuracy would be by the rates of misses and of false alarms of each class."""
    right = presence == predicted
    missed, alarmed = (
        1 - (right * of_kind).sum(axis=0) / np.maximum(1, of_kind.sum(axis=0))
        for of_kind in (presence == 1, presence == 0)
    )
    return count_accuracy_by_class(presence, np.where(presence == 1, missed, alarmed))


METRICS = {
    "class sum": class_sum,
    "equation 38": equation_38,
    "beyond equation 38": beyond_equation_38,
    "with a rate for each class": by_class,
    "presence": protocol.label_accuracy,
}
BOOTSTRAPPED = ("class sum", "beyond equation 38")


def strategy(question: Question, answers: Mapping[str, Answer]) -> dict[str, Answer]:
    """Count the classes that were predicted, for every architecture and seed."""
    [test] = question.test_sets.values()
    counted = {}
    for name, answer in answers.items():
        found = [predicted[""] for predicted in answer.predictions]
        counted[name] = Answer(
            scores={key: [metric(test.y, one) for one in found] for key, metric in METRICS.items()},
            test_errors={
                key: protocol.bootstrap(test, found, METRICS[key]) for key in BOOTSTRAPPED
            },
        )
    return counted


def main(argv: Sequence[str] | None = None) -> dict:
    """Make the table."""
    run = protocol.Run(protocol.parser(__doc__).parse_args(argv))
    for rank in (4, 32):
        zoo = run.zoo("digits", rank)
        metrics = {"accuracy": protocol.label_accuracy}
        size = Question(f"size, rank {rank}", zoo.data, zoo.size, metrics, groups=zoo.groups)
        run.ask(size)
        classes = f"classes, rank {rank}"
        presence = Question(classes, zoo.data, zoo.presence, protocol.labels(), groups=zoo.groups)
        counted = strategy(presence, run.ask(presence))
        run.keep(f"size as the number of predicted classes, rank {rank}", counted)
    return run.finish()


if __name__ == "__main__":
    main()
