from __future__ import annotations

import inspect

import pytest

from sklora.estimators import GLNetClassifier, GLNetRegressor, MLPNetClassifier, MLPNetRegressor
from sklora.estimators._docs import document


@pytest.mark.parametrize(
    "estimator", [GLNetClassifier, GLNetRegressor, MLPNetClassifier, MLPNetRegressor]
)
def test_every_parameter_is_documented_with_its_default(estimator):
    text = inspect.getdoc(estimator)
    assert "$" not in text
    for name, parameter in inspect.signature(estimator).parameters.items():
        [line] = [line for line in text.splitlines() if line.startswith(f"{name} : ")]
        shown = str(parameter.default).strip("'")
        assert line.replace('"', "").endswith(f"default={shown}")


def test_without_docstrings_a_class_stays_as_it_is():
    """As under ``python -OO``."""

    class Bare:
        def __init__(self, size=3):
            self.size = size

    assert document(Bare) is Bare
    assert Bare.__doc__ is None


@pytest.mark.parametrize(
    ("classifier", "regressor"),
    [(GLNetClassifier, GLNetRegressor), (MLPNetClassifier, MLPNetRegressor)],
)
def test_defaults_do_not_depend_on_the_kind_of_target(classifier, regressor):
    defaults = classifier().get_params()
    assert defaults.pop("class_weight") is None
    assert regressor().get_params() == defaults
