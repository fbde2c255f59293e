"""Reads which operators Torch-TensorRT converts, from its wheel: the wheel cannot be imported without TensorRT.

pip download --no-deps torch-tensorrt==2.13.0
python -m tests.tensorrt.read_converters torch_tensorrt-2.13.0-*.whl
"""

import argparse
import ast
import hashlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TARGET = Path(__file__).with_name("converters.json")
CONVERSION = "torch_tensorrt/dynamo/conversion/"
GROUPS = "torch_tensorrt/dynamo/lowering/_decomposition_groups.py"
DECOMPOSITIONS = "torch_tensorrt/dynamo/lowering/_decompositions.py"


def main() -> None:
    """Writes `converters.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    wheel = parser.parse_args().wheel
    TARGET.write_text(json.dumps(read(wheel), indent=1) + "\n", encoding="utf-8")


def read(wheel: Path) -> dict[str, Any]:
    """What the wheel says.

    Returns:
        `converters`: per operator whether one of its converters takes dynamic shapes, and their validators; `decomposed`: what
        torch's decompositions take apart before, and `replaced`: what its own do; `kept`: what is not taken apart.
    """
    converters: dict[str, dict[str, Any]] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith(CONVERSION) and name.endswith(".py"):
                for operator, options in _converters(ast.parse(archive.read(name))):
                    found = converters.setdefault(operator, {"dynamic": False, "validators": []})
                    found["dynamic"] |= options.get("supports_dynamic_shapes") == "True"
                    if "capability_validator" in options:
                        found["validators"].append(options["capability_validator"].split("(")[0].split(" ")[0])
        groups = _sets(ast.parse(archive.read(GROUPS)))
        replaced = sorted(_registered(ast.parse(archive.read(DECOMPOSITIONS))))
    return {
        "source": f"{wheel.name}, sha256 {hashlib.sha256(wheel.read_bytes()).hexdigest()}",
        "converters": dict(sorted(converters.items())),
        "decomposed": sorted(groups["torch_enabled_decompositions"]),
        "kept": sorted(groups["torch_disabled_decompositions"]),
        "replaced": replaced,
    }


def _converters(tree: ast.AST) -> Iterator[tuple[str, dict[str, str]]]:
    for node in ast.walk(tree):
        for decorator in getattr(node, "decorator_list", []):
            if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") == "dynamo_tensorrt_converter":
                options = {str(keyword.arg): ast.unparse(keyword.value) for keyword in decorator.keywords}
                yield ast.unparse(decorator.args[0]).removeprefix("torch.ops."), options


def _sets(tree: ast.AST) -> dict[str, list[str]]:
    """Sets of operators that are assigned to names."""
    return {
        node.target.id: [ast.unparse(element) for element in node.value.elts]
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Set)
    }


def _registered(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        for decorator in getattr(node, "decorator_list", []):
            if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") == "register_torch_trt_decomposition":
                operator = ast.unparse(decorator.args[0]).removeprefix("torch.ops.")
                if "." in operator:  # in-place operators are registered in a loop, whose variable is none
                    yield operator


if __name__ == "__main__":
    main()
