"""Table 3: what was an adapter trained on? Attributes of the images, and their classes.

Attributes are asked of the varied digits twice: with adapters of one set of images on both sides
of the split, as in the paper, and with every set on one side. Attributes go with digits, sevens
having no loop: beside both stands what is right of who knows the digit and no more. Classes are
asked of the digits, at ranks 4 and 32, with every set on one side.

    python examples/paper/table3.py --n-jobs 2 --output table3.json
"""

from collections.abc import Mapping, Sequence
from typing import Any

import protocol
from numpy.typing import NDArray
from protocol import Answer, Question
from sklearn.tree import DecisionTreeClassifier


def by_digit(question: Question, digit: NDArray[Any]) -> Answer:
    """Answer by the digit alone: what most training adapters of the digit are."""
    rows, answer = question.rows, Answer()
    parts = {"train": digit[rows.train, None], "": digit[rows.test, None]}
    model = DecisionTreeClassifier(random_state=0)
    y = question.y[rows.train]
    protocol.add(answer, question, protocol.fit_predict(model, parts, y, [""]))
    answer.test_errors = question.test_errors(answer.predictions)
    return answer


def beyond(question: Question, answers: Mapping[str, Answer], known: Answer) -> dict[str, Answer]:
    """Give how much more often models are right than who knows the digit, adapter by adapter."""
    [test] = question.test_sets.values()
    more = {}
    for name, answer in answers.items():
        found = [one[""] for one in answer.predictions]
        scores, error = protocol.difference(test, found, [known.predictions[0][""]] * len(found))
        more[name] = Answer(scores={"accuracy": scores}, test_errors={"accuracy": error})
    return more


def main(argv: Sequence[str] | None = None) -> dict:
    """Make the table."""
    run = protocol.Run(protocol.parser(__doc__).parse_args(argv))
    varied = run.zoo("varied_digits")
    asked = varied.data, varied.attributes, protocol.labels(varied.target_names)
    for name, groups in (
        ("sets shared by the parts", None),
        ("every set in one part", varied.groups),
    ):
        question = Question(f"attributes, {name}", *asked, groups=groups)
        answers, known = run.ask(question), by_digit(question, varied.digit)
        run.keep(f"{question.name}, by the digit alone", {"(digit alone)": known})
        run.keep(f"{question.name}, beyond the digit", beyond(question, answers, known))
    for rank in (4, 32):
        zoo = run.zoo("digits", rank)
        name, metrics = f"classes, rank {rank}", protocol.labels()
        run.ask(Question(name, zoo.data, zoo.presence, metrics, groups=zoo.groups))
    return run.finish()


if __name__ == "__main__":
    main()
