"""Figure 4: trained at rank 4, tested at ranks 1 to 32.

Attributes of the varied digits. ``svd`` has the four singular values that it learnt from: of
larger ranks it sees the first four, and of smaller ones it sees zeros in place of those that are
missing. ``dense`` and ``gl-net`` take any rank. The test adapters are of sets that training and
validation did not see; at every rank the same sets and hyperparameters.

    python examples/paper/figure4.py --n-jobs 2 --output figure4.json --plot figure4.svg
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import protocol
from numpy.typing import NDArray
from protocol import Answer, Question, TestSet, standard_error
from sklearn.utils import Bunch

RANKS, QUICK_RANKS = (1, 2, 4, 8, 16, 32), (1, 4, 8)
TRAINED = 4
COLOURS = {
    "dense": "#E69F00", "gl-net": "#0072B2", "gl-net, spectrum": "#CC79A7", "svd": "#009E73",
    "(blind)": "0.4",
}  # fmt: skip


def draw(answers: Mapping[str, Answer], ranks: Sequence[int], path: str) -> None:
    """Draw accuracy by rank."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, answer in answers.items():
        values = answer.scores.values()
        axes.errorbar(
            ranks,
            [np.mean(seeds) for seeds in values],
            [standard_error(seeds) for seeds in values],
            fmt="o-",
            color=COLOURS[name],
            label=name,
            markersize=5,
        )
    axes.axvline(TRAINED, color="0.8", zorder=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.set(xlabel=f"rank of the test adapters (trained at {TRAINED})", ylabel="accuracy")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def test_sets(zoos: Mapping[int, Bunch], held_out: NDArray[Any]) -> dict[str, TestSet]:
    """Give the adapters of the held-out sets that zoos of all ranks have."""
    n_common = min(len(zoo.data) for zoo in zoos.values())
    tests = {}
    for rank, zoo in zoos.items():
        rows = np.flatnonzero(np.isin(zoo.groups[:n_common], held_out))
        tests[f"rank {rank}"] = TestSet(zoo.data[rows], zoo.attributes[rows], zoo.groups[rows])
    return tests


def lost_accuracy(question: Question, answers: Mapping[str, Answer]) -> dict[str, Answer]:
    """Give how much less often models are right than at the rank they learnt from, set by set."""
    home = f"rank {TRAINED}"
    lost = {name: Answer() for name in answers}
    for rank, test in question.test_sets.items():
        for name, answer in answers.items():
            there, here = ([one[of] for one in answer.predictions] for of in (home, rank))
            lost[name].scores[rank], lost[name].test_errors[rank] = protocol.difference(
                test, there, here
            )
    return lost


def main(argv: Sequence[str] | None = None) -> dict:
    """Make the figure's numbers, and the figure."""
    parser = protocol.parser(__doc__)
    parser.add_argument("--plot", help="draw the chart into this file")
    text = "size of the zoos of other ranks, of which the held-out sets are tested; default: 1000"
    parser.add_argument("--n-tested", type=int, default=1000, help=text)
    run = protocol.Run(parser.parse_args(argv))
    ranks = QUICK_RANKS if run.args.quick else RANKS
    zoo = run.zoo("varied_digits", TRAINED)
    zoos = {
        rank: zoo if rank == TRAINED else run.zoo("varied_digits", rank, run.args.n_tested)
        for rank in ranks
    }
    held_out = zoo.groups[protocol.split(len(zoo.data), zoo.groups).test]
    question = Question(
        "attributes",
        zoo.data,
        zoo.attributes,
        protocol.labels(),
        groups=zoo.groups,
        architectures=("svd", "dense", "gl-net", "gl-net, spectrum"),
        tests=test_sets(zoos, held_out),
    )
    answers = run.ask(question)
    run.keep(f"accuracy lost from rank {TRAINED}", lost_accuracy(question, answers))
    report = run.finish()
    if run.args.plot:
        draw(answers, ranks, run.args.plot)
    return report


if __name__ == "__main__":
    main()
