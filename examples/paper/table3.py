"""Table 3: what was an adapter trained on? Attributes of the images, and their classes.

Attributes are asked of the varied digits twice: with adapters of one set of images on both sides
of the split, as in the paper, and with every set on one side. Classes are asked of the digits, at
ranks 4 and 32, with every set on one side.

    python examples/paper/table3.py --n-jobs 2 --output table3.json
"""

from collections.abc import Sequence

import protocol
from protocol import Question


def main(argv: Sequence[str] | None = None) -> dict:
    """Make the table."""
    run = protocol.Run(protocol.parser(__doc__).parse_args(argv))
    varied = run.zoo("varied_digits")
    asked = varied.data, varied.attributes, protocol.labels(varied.target_names)
    run.ask(Question("attributes, sets shared by the parts", *asked))
    run.ask(Question("attributes, every set in one part", *asked, groups=varied.groups))
    for rank in (4, 32):
        zoo = run.zoo("digits", rank)
        name, metrics = f"classes, rank {rank}", protocol.labels()
        run.ask(Question(name, zoo.data, zoo.presence, metrics, groups=zoo.groups))
    return run.finish()


if __name__ == "__main__":
    main()
