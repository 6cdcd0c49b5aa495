"""The layers of the package: imports point one way, and heavy packages stay where they are needed."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "nemo_rao"
FOUNDATION = {"batch", "errors", "keys", "files", "part_file", "other_names"}

# Layer -> the layers it may import, besides itself. Everything that imports appears here.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "keys": {"errors"},
    "other_names": set(),
    "batch": set(),
    "files": {"errors"},
    "part_file": {"errors", "files"},
    "progress": set(),
    "gpus": set(),
    "malloc": set(),
    "cpu": {"errors", "gpus", "malloc"},
    "planning": {"errors", "ops"},  # of the operations, what they hold at a time
    "data": FOUNDATION,
    "ops": FOUNDATION,
    "objectives": FOUNDATION,
    "model_files": {"errors"},
    "mcore": FOUNDATION | {"data", "ops", "objectives"},
    "generation": FOUNDATION | {"data", "model_files", "progress"},
    "scoring": FOUNDATION | {"data", "generation", "progress"},  # a judge may be a model that generates here
    "integration": FOUNDATION
    | {"data", "ops", "objectives", "mcore", "cpu", "gpus", "progress", "scoring", "planning"},
    "hugging_face": FOUNDATION | {"data", "mcore", "integration", "model_files"},
    "show": FOUNDATION | {"data", "integration", "objectives", "progress"},
    "cluster": FOUNDATION | {"integration"},
    "doctor": FOUNDATION | {"integration", "planning"},  # the latter in processes of their own
    "commands": {
        *("errors", "other_names", "cluster", "doctor", "generation", "hugging_face", "integration", "scoring", "show")
    },
    "cli": {"errors", "other_names", "commands", "malloc"},
    "__main__": {"cli"},
    "__init__": set(),
}

# Heavy package -> the layers that may import it.
HEAVY: dict[str, set[str]] = {
    "megatron": {"doctor", "mcore", "hugging_face", "integration", "cpu"},
    "nemo": {"doctor", "hugging_face", "integration", "cpu"},
    "lightning": {"integration", "cpu"},
    "nemo_run": {"doctor", "integration"},
    "hydra": {"cluster", "integration"},
    "omegaconf": {"cluster", "integration"},
    "transformers": {"data", "doctor", "generation", "hugging_face", "show"},
    "vllm": {"doctor", "generation"},
    "lm_eval": {"doctor", "generation"},
    "torch": {
        "batch",
        "data",
        "doctor",
        "generation",
        "hugging_face",
        "ops",
        "objectives",
        "mcore",
        "integration",
        "cpu",
        "gpus",
    },
}


def imports() -> Iterator[tuple[str, str, str]]:
    """(file, its layer, module imported) of every import in the package, inside functions too."""
    for file in sorted(PACKAGE.rglob("*.py")):
        path = file.relative_to(PACKAGE)
        layer = path.parts[0] if len(path.parts) > 1 else path.stem
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: imports are absolute"
                # `from nemo_rao import cpu` imports a layer; `from nemo_rao.data import rows` names one already.
                modules = (
                    [f"nemo_rao.{alias.name}" for alias in node.names]
                    if node.module == "nemo_rao"
                    else [str(node.module)]
                )
            else:
                continue
            for module in modules:
                yield str(path), layer, module


def test_each_layer_imports_only_the_layers_below_it() -> None:
    wrong = []
    for file, layer, module in imports():
        if not module.startswith("nemo_rao."):
            continue
        imported = module.split(".")[1]
        if imported not in MAY_IMPORT:  # a name of the package itself, such as __version__
            continue
        if imported != layer and imported not in MAY_IMPORT[layer]:
            wrong.append(f"{file} imports {module}")
    assert not wrong


def test_every_module_belongs_to_a_known_layer() -> None:
    layers = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert layers <= set(MAY_IMPORT)


def test_heavy_packages_are_imported_in_their_own_layer_only() -> None:
    wrong = [
        f"{file} imports {module}"
        for file, layer, module in imports()
        if layer not in HEAVY.get(module.split(".")[0], {layer})
    ]
    assert not wrong


def test_no_subpackage_could_shadow_nemo_or_megatron() -> None:
    assert not {path.name for path in PACKAGE.rglob("*") if path.is_dir()} & {"nemo", "megatron"}


def test_objectives_and_recipes_import_without_nemo_and_megatron() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['nemo', 'megatron', 'lightning', 'transformers']))\n"
        "import nemo_rao.objectives.registry, nemo_rao.config.compose, nemo_rao.config.checks"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent, timeout=60)
