"""Engines of static shapes: ONNX and TensorRT, with eviction inside (`docs/export.md`)."""

from tgvkv_compile.export.capacity.budget_plan import BudgetPlan
from tgvkv_compile.export.capacity.calibrate import calibrate
from tgvkv_compile.export.manifest import Manifest
from tgvkv_compile.export.onnx.files import export_onnx
from tgvkv_compile.export.onnx.generator import OnnxGenerator
from tgvkv_compile.export.program import Programs, export_program
from tgvkv_compile.export.tensorrt.engines import export_tensorrt, trtexec_commands
from tgvkv_compile.export.tensorrt.generator import TensorRTGenerator
from tgvkv_compile.export.trace.families import encode

__all__ = [
    "BudgetPlan",
    "Manifest",
    "OnnxGenerator",
    "Programs",
    "TensorRTGenerator",
    "calibrate",
    "encode",
    "export_onnx",
    "export_program",
    "export_tensorrt",
    "trtexec_commands",
]
