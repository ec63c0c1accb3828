"""A model as a file for other programs: ONNX and torch.export, any number of images at once, preprocessing inside."""

import io
import json
from pathlib import Path

import torch

from models.earthloc import EarthLoc
from models.weights import interface, save_safetensors
from utils.files import replacing

FORMATS = {"safetensors": ".safetensors", "onnx": ".onnx", "torch_export": ".pt2"}  # and their files' suffixes
INPUT, OUTPUT = "images", "descriptors"
INTERFACE_FILE = "interface.json"  # inside a .pt2


def export(model: EarthLoc, path: str | Path, kind: str) -> None:
    """Writes one of FORMATS to path, whole or not at all; `interface` of the model is in each file's metadata.

    safetensors: half precision, for `load_model`. onnx: float32, input "images", output "descriptors". torch_export:
    float32, for `torch.export.load`. RuntimeError where a package is missing.
    """
    if kind == "safetensors":
        save_safetensors(model, path)
        return
    content = {"onnx": onnx_bytes, "torch_export": torch_export_bytes}[kind](model)
    with replacing(path) as file:
        file.write(content)


def traced(model: EarthLoc) -> torch.export.ExportedProgram:
    """The graph of a model in eval mode on the CPU, for any number of images of its size."""
    model = model.cpu().float().eval()
    example = torch.zeros(2, 3, model.config.image_size, model.config.image_size)
    with torch.no_grad():
        return torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))


def torch_export_bytes(model: EarthLoc) -> bytes:
    """-> a .pt2 file; `extra_files` of `torch.export.load` reads interface.json out of it."""
    file = io.BytesIO()
    torch.export.save(traced(model), file, extra_files={INTERFACE_FILE: json.dumps(interface(model))})
    return file.getvalue()


def onnx_bytes(model: EarthLoc) -> bytes:
    """-> an .onnx file, weights inside; the interface is in its metadata_props."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise RuntimeError(f"--format onnx: {error.name} is not installed; pip install onnx onnxscript") from error
    program = torch.onnx.export(
        traced(model), input_names=[INPUT], output_names=[OUTPUT], dynamo=True, verbose=False, optimize=True
    )
    told = {key: each if isinstance(each, str) else json.dumps(each) for key, each in interface(model).items()}
    program.model.metadata_props.update(told)
    return program.model_proto.SerializeToString()
