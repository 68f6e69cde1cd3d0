"""Table 2: how good are a finished adapter's samples? Regression of their score.

The adapters are those of the varied digits, whose learning rate, steps and batch size differ. The
score is that of a fixed classifier of real digits: how surely it sees the training classes in 33
samples. The column that the paper calls R2 is Spearman's rho; here R2 is the share of the variance
that is explained.

    python examples/paper/table2.py --n-jobs 2 --output table2.json
"""

from collections.abc import Sequence

import protocol


def main(argv: Sequence[str] | None = None) -> dict:
    """Make the table."""
    run = protocol.Run(protocol.parser(__doc__).parse_args(argv))
    zoo = run.zoo("varied_digits")
    run.ask(
        protocol.Question(
            "score of the samples",
            zoo.data,
            zoo.score,
            protocol.REGRESSION,
            task="regression",
            groups=zoo.groups,
            architectures=tuple(protocol.ARCHITECTURES),
        )
    )
    return run.finish()


if __name__ == "__main__":
    main()
