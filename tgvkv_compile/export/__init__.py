"""Engines of static shapes: ONNX and TensorRT, with eviction inside (`docs/export.md`)."""

from tgvkv_compile.export.budget_plan import BudgetPlan
from tgvkv_compile.export.calibrate import calibrate
from tgvkv_compile.export.families import encode
from tgvkv_compile.export.manifest import Manifest
from tgvkv_compile.export.onnx_files import export_onnx
from tgvkv_compile.export.onnx_generator import OnnxGenerator
from tgvkv_compile.export.program import Programs, export_program
from tgvkv_compile.export.tensorrt_engines import export_tensorrt, trtexec_commands
from tgvkv_compile.export.tensorrt_generator import TensorRTGenerator

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
