"""The layers of the package: imports point one way, and heavy packages stay where they are needed."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "nemo_rao"
FOUNDATION = {"batch", "errors", "keys", "runtime"}

# Layer -> the layers it may import, besides itself. Everything that imports appears here, from the ground up: what is
# further down may import what is above it.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "other_names": set(),
    "batch": set(),
    "keys": {"errors"},
    "runtime": {"errors"},
    "ops": set(),
    "objectives": FOUNDATION | {"other_names"},
    "model_files": {"errors"},
    "rows": FOUNDATION,
    "data": FOUNDATION | {"rows"},
    "mcore": FOUNDATION | {"data", "ops", "objectives"},
    "rollout": FOUNDATION | {"data", "mcore", "ops"},
    "config": FOUNDATION | {"data", "objectives", "other_names", "rows"},
    "checkpoint": FOUNDATION | {"config", "data", "mcore", "objectives"},
    "planning": FOUNDATION
    | {"config", "data", "objectives", "ops", "rows"},  # of the operations, what they hold at a time
    "loop": FOUNDATION | {"checkpoint", "config", "data", "mcore", "objectives", "ops", "planning", "rollout"},
    "engines": {"config", "data", "loop", "objectives"},  # which engine there is, and what it is asked
    "engines.nemo": FOUNDATION | {"checkpoint", "config", "data", "loop", "mcore", "objectives"},
    "engines.bridge": FOUNDATION | {"checkpoint", "config", "data", "loop", "mcore", "objectives"},
    "generation": FOUNDATION | {"data", "model_files", "ops", "rows"},
    "scoring": FOUNDATION | {"data", "generation", "rows"},  # a judge may be a model that generates here
    "hugging_face": FOUNDATION
    | {"checkpoint", "config", "data", "engines.bridge", "engines.nemo", "mcore", "model_files"},
    "training": FOUNDATION
    | {
        "checkpoint",
        "config",
        "data",
        "engines",
        "hugging_face",
        "loop",
        "mcore",
        "objectives",
        "rollout",
        "rows",
        "scoring",
    },
    "show": FOUNDATION | {"config", "data", "objectives", "rows", "training"},
    "study": FOUNDATION
    | {"checkpoint", "config", "generation", "hugging_face", "objectives", "planning", "rows", "scoring", "training"},
    "recipes": {"config", "errors", "training"},
    "cluster": FOUNDATION | {"checkpoint", "config", "training"},
    "doctor": FOUNDATION
    | {"config", "engines.bridge", "engines.nemo", "training"},  # the latter two in processes of their own
    "demo": FOUNDATION | {"config", "data", "rows", "training"},
    "commands": {
        "errors",
        "other_names",
        "cluster",
        "config",
        "demo",
        "doctor",
        "generation",
        "hugging_face",
        "planning",
        "runtime",
        "scoring",
        "show",
        "study",
        "training",
    },
    "cli": {"errors", "other_names", "commands", "runtime"},
    "__main__": {"cli"},
    "__init__": set(),
}

# Heavy package -> the layers that may import it.
HEAVY: dict[str, set[str]] = {
    "nemo": {"engines.nemo"},
    "lightning": {"engines.nemo"},
    "lightning_utilities": {"engines.nemo"},
    "nemo_run": {"doctor", "recipes"},
    "megatron": {"doctor", "mcore", "hugging_face", "loop", "rollout", "engines.nemo", "engines.bridge", "training"},
    "megatron.bridge": {"engines.bridge"},
    "hydra": {"cluster", "config"},
    "omegaconf": {"cluster", "config"},
    "transformers": {"data", "demo", "doctor", "engines.bridge", "engines.nemo", "generation", "hugging_face", "show"},
    "vllm": {"doctor", "generation", "rollout"},
    "lm_eval": {"doctor", "generation"},
    "torch": {
        "batch",
        "checkpoint",
        "config",
        "data",
        "doctor",
        "engines.bridge",
        "engines.nemo",
        "generation",
        "hugging_face",
        "loop",
        "mcore",
        "objectives",
        "ops",
        "rollout",
        "runtime",
        "training",
    },
}

# Against the order, and on purpose: a recipe from before there were families names a class of NeMo.
EXCEPTION = "config/architecture.py imports nemo_rao.engines.nemo.config_classes"

LARGEST_ROOM = 0.12  # of the package's lines


def layer_of(parts: tuple[str, ...]) -> str:
    """Of a module's path in the package; an engine is a layer of its own."""
    return ".".join(parts[:2]) if parts[0] == "engines" and len(parts) > 2 else Path(parts[0]).stem


def imports() -> Iterator[tuple[str, str, str]]:
    """(file, its layer, module imported) of every import in the package, inside functions too."""
    for file in sorted(PACKAGE.rglob("*.py")):
        path = file.relative_to(PACKAGE)
        layer = layer_of(path.parts)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: imports are absolute"
                # `from nemo_rao import keys` imports a layer; `from nemo_rao.data import store` names one already.
                modules = (
                    [f"nemo_rao.{alias.name}" for alias in node.names]
                    if node.module == "nemo_rao"
                    else [str(node.module)]
                )
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
                modules = [one.value for one in node.args if isinstance(one, ast.Constant)]  # not those of a variable
            else:
                continue
            for module in modules:
                yield str(path), layer, module


def test_each_layer_imports_only_the_layers_below_it() -> None:
    wrong = []
    for file, layer, module in imports():
        if not module.startswith("nemo_rao."):
            continue
        imported = layer_of((*module.split(".")[1:], ""))
        if imported not in MAY_IMPORT:  # a name of the package itself, such as __version__
            continue
        if imported != layer and imported not in MAY_IMPORT[layer]:
            wrong.append(f"{file} imports {module}")
    assert wrong == [EXCEPTION]


def test_every_module_belongs_to_a_known_layer() -> None:
    layers = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert layers <= set(MAY_IMPORT)


def test_no_layer_reaches_itself_through_others() -> None:
    """Of the layers that are allowed; an engine's own imports are held to them above."""

    def below(layer: str, seen: set[str]) -> set[str]:
        for other in MAY_IMPORT[layer] - seen:
            seen.add(other)
            below(other, seen)
        return seen

    assert not [layer for layer in MAY_IMPORT if layer in below(layer, set())]


def test_no_room_of_the_house_is_too_large() -> None:
    lines: dict[str, int] = {}
    for file in PACKAGE.rglob("*.py"):
        room = file.relative_to(PACKAGE).parts[0]
        lines[room] = lines.get(room, 0) + len(file.read_text().splitlines())
    total = sum(lines.values())
    assert {room: count / total for room, count in lines.items() if count > LARGEST_ROOM * total} == {}


def test_heavy_packages_are_imported_in_their_own_layer_only() -> None:
    wrong = [
        f"{file} imports {module}"
        for file, layer, module in imports()
        for package in (module.split(".")[0], ".".join(module.split(".")[:2]))
        if layer not in HEAVY.get(package, {layer})
    ]
    assert not wrong


def test_no_subpackage_could_shadow_nemo_or_megatron() -> None:
    assert not {path.name for path in PACKAGE.iterdir() if path.is_dir()} & {"nemo", "megatron"}


def test_objectives_and_recipes_import_without_nemo_and_megatron() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['nemo', 'megatron', 'lightning', 'transformers']))\n"
        "import nemo_rao.objectives.registry, nemo_rao.config.compose, nemo_rao.training.checks"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent, timeout=60)


def test_readme_lists_every_layer_above_those_that_it_imports() -> None:
    readme = (PACKAGE.parent / "README.md").read_text().partition("## Layout\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^- \*\*.*\*\*: (.*)$", readme, re.MULTILINE)
    listed = [
        [name.strip("/").replace("/", ".").removesuffix(".py") for name in row[1:-1].split("`, `")] for row in rows
    ]
    height = {layer: -number for number, layers in enumerate(listed) for layer in layers}
    height["engines"] = height["engines.nemo"]
    assert set(height) == set(MAY_IMPORT) - {"__init__", "__main__"}
    assert not [
        f"{layer} imports {other}" for layer in height for other in MAY_IMPORT[layer] if height[other] > height[layer]
    ]
