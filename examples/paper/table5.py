"""Table 5: adapters of a small language model. Their sources, their loss, their accuracy.

Every adapter was trained on a random subset of 19 packages of Python's standard library, and on
one that all share, with hyperparameters of its own. Which packages were they, and how well does
the model predict source that it has not seen?

    python examples/paper/table5.py --n-jobs 2 --output table5.json
"""

from collections.abc import Sequence

import protocol
from protocol import Question


def main(argv: Sequence[str] | None = None) -> dict:
    """Make the table."""
    run = protocol.Run(protocol.parser(__doc__).parse_args(argv))
    zoo = run.zoo("code")
    run.ask(Question("sources", zoo.data, zoo.sources, protocol.labels(), groups=zoo.groups))
    for name, y in (("validation loss", zoo.loss), ("next-token accuracy", zoo.accuracy)):
        run.ask(
            Question(name, zoo.data, y, protocol.REGRESSION, task="regression", groups=zoo.groups)
        )
    return run.finish()


if __name__ == "__main__":
    main()
