"""Appendix E: adapters that other methods than LoRA train.

For each method, zoos of digits that differ in it alone, and the question which classes an adapter
was trained on. Rows of DoRA end in its magnitudes. LoKr's Kronecker products are rows of rank 1,
whose gauge group is GL(1). PiSSA's adapters all start from the same factors, so that their gauges
agree at the start; of LoRA's, no two do.

    python examples/paper/appendix_e.py --n-jobs 2 --output appendix_e.json
"""

from collections.abc import Sequence

import protocol
from protocol import Question

METHODS, QUICK_METHODS = ("lora", "lora+", "pissa", "dora", "lokr"), ("dora", "lokr")


def main(argv: Sequence[str] | None = None) -> dict:
    """Make a table for each method."""
    run = protocol.Run(protocol.parser(__doc__).parse_args(argv))
    for method in QUICK_METHODS if run.args.quick else METHODS:
        zoo = run.zoo("digits", method=method)
        name, metrics = f"classes, {method}", protocol.labels()
        run.ask(Question(name, zoo.data, zoo.presence, metrics, groups=zoo.groups))
    return run.finish()


if __name__ == "__main__":
    main()
