"""Displays: look at scores, spectra, modules, training and zoos."""

from sklora.inspection._architectures import ArchitectureComparisonDisplay
from sklora.inspection._importance import ModuleImportanceDisplay
from sklora.inspection._permutation import module_importance
from sklora.inspection._spectrum import SpectrumDisplay
from sklora.inspection._training import TrainingCurveDisplay
from sklora.inspection._zoo_map import ZooMapDisplay

__all__ = [
    "ArchitectureComparisonDisplay",
    "ModuleImportanceDisplay",
    "SpectrumDisplay",
    "TrainingCurveDisplay",
    "ZooMapDisplay",
    "module_importance",
]
