"""How tests name the tensors of PEFT, and how diffusers keeps its configurations."""

import json

LORA = {"peft_type": "LORA", "r": 3, "lora_alpha": 6}
PREFIX = "base_model.model."
HADA = {
    "hada_w1_a": (5, 2),
    "hada_w1_b": (2, 4),
    "hada_w2_a": (5, 2),
    "hada_w2_b": (2, 4),
}


def named(module, **tensors):
    """Tensors of one module by what their names end in, with dots for double underscores."""
    return {
        f"{PREFIX}{module}.{role.replace('__', '.')}": tensor for role, tensor in tensors.items()
    }


def linear(module, A, B):
    return named(module, lora_A__weight=A, lora_B__weight=B)


def described(**settings):
    """The metadata entry in which diffusers keeps PEFT's configurations."""
    flat = {key.replace("__", "."): value for key, value in settings.items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(flat)}
