"""Fitted models for other programs and people: model files, torch.export, ONNX, and model cards."""

from sklora._base import VersionWarning
from sklora.deployment._card import model_card
from sklora.deployment._export import export_onnx, export_program, program_inputs
from sklora.deployment._model_file import load_model, save_model

__all__ = [
    "VersionWarning",
    "export_onnx",
    "export_program",
    "load_model",
    "model_card",
    "program_inputs",
    "save_model",
]
