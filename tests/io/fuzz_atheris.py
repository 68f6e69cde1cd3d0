"""Coverage-guided fuzzing of adapter files, run by hand; pytest does not collect it.

    pip install --target /tmp/atheris atheris
    PYTHONPATH=/tmp/atheris python tests/io/fuzz_atheris.py /tmp/corpus -max_total_time=180

The corpus folder starts with small files of each format; the first byte of an input says which
options it is read with, then follow two bytes with the length of its adapter_config.json, that
text, and the file. Anything but a correct read or an `AdapterError` ends the run, and libFuzzer
saves the input.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import atheris
import numpy as np
from safetensors.numpy import save

with atheris.instrument_imports(include=["sklora.io", "json"]):
    from sklora.io import AdapterError, read_adapters, scan_adapters

CONFIG = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 3, "alpha_pattern": {"q.*": 4}})
OPTIONS = (
    {"allow_torch_zip": True, "scale": 1.0},
    {"allow_torch_zip": True, "names": "raw", "lokr": "kronecker"},
    {"keys": ("w_a_{module}", "w_b_{module}")},
)
FOLDER = Path(tempfile.mkdtemp())


def seeds():
    """Give inputs from which to start."""
    down, up, two = np.ones((2, 3), np.float16), np.ones((4, 2), np.float16), np.ones((2, 2))
    files = [
        {"base_model.model.q.lora_A.weight": down, "base_model.model.q.lora_B.weight": up},
        {"q.lora_down.weight": down, "q.lora_up.weight": up, "q.alpha": np.array(2.0)},
        {"q.hada_w1_a": two, "q.hada_w1_b": two, "q.hada_w2_a": two, "q.hada_w2_b": two},
        {"q.lokr_w1": two, "q.lokr_w2_a": two, "q.lokr_w2_b": two, "q.dora_scale": two[:1]},
        {"unet.q.lora_A.weight": down, "unet.q.lora_B.weight": up},
        {"q.lora_a": up, "q.lora_b": down},
        {"unet:0:up": up, "unet:0:down": down},
        {"w_a_0": down, "w_b_0": up},
    ]
    contents = [save(tensors) for tensors in files]
    np.savez(FOLDER / "seed.npz", **files[5])
    contents += [(FOLDER / "seed.npz").read_bytes(), b"GGUF\x03\0\0\0" + bytes(16)]
    for content in contents:
        for option in range(len(OPTIONS)):
            config = CONFIG.encode()
            yield bytes([option]) + len(config).to_bytes(2, "little") + config + content
            yield bytes([option, 0, 0]) + content


def read(data):
    """Read one input both ways."""
    option, length = data[0] % len(OPTIONS), int.from_bytes(data[1:3], "little")
    config, content = data[3 : 3 + length], data[3 + length :]
    path = FOLDER / "adapter"
    path.write_bytes(content)
    (FOLDER / "adapter_config.json").unlink(missing_ok=True)
    if config:
        (FOLDER / "adapter_config.json").write_bytes(config)
    [report] = scan_adapters(path, **OPTIONS[option])
    json.dumps(report.to_dict(), allow_nan=False)
    try:
        X = read_adapters(path, on_base_model="ignore", **OPTIONS[option])
        flat = X.read()
    except AdapterError as error:
        if error.path != str(path) or not error.reason.isprintable():
            raise RuntimeError(f"a bad message: {error!r}") from error
        return
    if report.error is not None or flat.shape != X.shape or not np.isfinite(flat).all():
        raise RuntimeError(f"a wrong read: {X!r}, {report!r}")


def main():
    corpus = next((arg for arg in sys.argv[1:] if not arg.startswith("-")), None)
    if corpus:
        os.makedirs(corpus, exist_ok=True)
        for place, data in enumerate(seeds()):
            Path(corpus, f"seed{place}").write_bytes(data)
    atheris.Setup(sys.argv, lambda data: read(data) if len(data) > 2 else None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
