"""All private torch imports of the package, in one place.

Checked on torch 2.11.0 and 2.13.0. Each name says what it is used for:

- `FakeTensorMode`, `ShapeEnv`, `DimDynamic`, `ConstantSource`: a shape environment of our own (`fx.environment`).
- `trace_structured`: graphs in `TORCH_TRACE` (`fx.dump`).
- `enable_python_dispatcher`: some operators decompose for symbolic sizes only with it.
- `symbolic_shapes_config`: a flag that torch before 2.13 needs (`backend.dynamo`).
- `is_traceable_wrapper_subclass`: whether a tensor is made of other tensors, as a `DTensor` is (`fx.environment`).
- `GraphCompileReason` is what dynamo puts on a graph module as `compile_subgraph_reason`.
"""

from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.output_graph import GraphCompileReason
from torch._dynamo.source import ConstantSource
from torch._logging._internal import trace_structured
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental import _config as symbolic_shapes_config
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = [
    "ConstantSource",
    "DimDynamic",
    "FakeTensorMode",
    "GraphCompileReason",
    "ShapeEnv",
    "enable_python_dispatcher",
    "is_traceable_wrapper_subclass",
    "symbolic_shapes_config",
    "trace_structured",
]
