"""The order of the rooms: a room imports only rooms before it, and the core needs JAX alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import flaxcls

PACKAGE = Path(flaxcls.__file__).parent

CORE = (
    "ops",
    "models",
    "losses",
    "metrics",
    "optimizers",
    "batch",
    "augment",
    "freezing",
    "rematerialisation",
    "state",
    "sharding",
    "step",
)
# Each room imports only those before it.
ROOMS = (
    "errors",
    "atomic_files",
    "interrupt",
    *CORE,
    "memory",
    "compilation",
    "history",
    "config",
    "pretrained",
    "data",
    "checkpoint",
    "runlog",
    "events",
    "progress",
    "analysis.plots",
    "experiment",
    "evaluate",
    "results",
    "train",
    "analysis",
    "deploy",
    "main",
    "__main__",
)
# These import no room but the first two.
LEAVES = ("errors", "atomic_files", "history", "config")

# The only rooms that import a library which a bare accelerator machine may lack.
LIBRARIES = {
    "PIL": {"data", "analysis", "deploy"},
    "absl": {"data", "main"},
    "anyio": {"deploy"},
    "clu": {"metrics"},
    "cv2": {"deploy"},
    "cykooz_resizer": {"data"},
    "grain": {"data"},
    "huggingface_hub": {"pretrained"},
    "jinja2": {"analysis", "deploy"},
    "matplotlib": {"analysis.plots", "analysis"},
    "ml_collections": {"config", "experiment", "results", "train", "analysis", "deploy", "main"},
    "orbax": {"checkpoint"},
    "rich": {"progress", "analysis", "deploy"},
    "safetensors": {"pretrained", "deploy"},
    "scipy": {"analysis"},
    "simplejpeg": {"data"},
    "sklearn": {"data", "analysis", "deploy"},
    "starlette": {"deploy"},
    "tensorboardX": {"events"},
    "tensorflow": {"data"},
    "tensorflow_datasets": {"data"},
    "uvicorn": {"deploy"},
}
EVERYWHERE = {"flax", "jax", "ml_dtypes", "numpy", "optax"}

# Where a module is chosen by name while the program runs: the mode, and the source of the data.
CHOOSES_MODULES = {"__main__", "main", "data.load"}
IMPORTERS = {"importlib.import_module", "import_module", "__import__"}
# Imports inside a function, of what takes long and is not needed before the first step:
# tensorboardX brings PyTorch, plots bring matplotlib.
LATE = {("events", "tensorboardX"), ("results", "flaxcls.analysis.plots")}
# Optional libraries: what needs them says which extra to install.
LATE |= {("deploy.video", "cv2"), ("deploy.app", "flaxcls.deploy.page")}

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def _room(module):
    """The longest name in ROOMS that `module` lies in."""
    rooms = [r for r in ROOMS if module == r or module.startswith(f"{r}.")]
    assert rooms, f"{module} belongs to no room: give it a place in ROOMS"
    return max(rooms, key=len)


def _imported(node):
    """Full names of what an import statement brings in."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert not node.level, "imports are absolute"
    names = []
    for alias in node.names:
        if f"{node.module}.{alias.name}" == "flaxcls.__version__":
            continue
        full = f"{node.module}.{alias.name}"
        is_module = full.removeprefix("flaxcls.") in MODULES or node.module == "flaxcls"
        names.append(full if is_module else node.module)
    return names


def _imports(module):
    statements = (n for n in ast.walk(TREES[module]) if isinstance(n, ast.Import | ast.ImportFrom))
    return [name for statement in statements for name in _imported(statement)]


def _own_imports(module):
    prefix = "flaxcls."
    return [name.removeprefix(prefix) for name in _imports(module) if name.startswith(prefix)]


def _libraries(module):
    tops = {name.partition(".")[0] for name in _imports(module)}
    return tops - set(sys.stdlib_module_names) - {"flaxcls"}


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_only_rooms_before_it(module):
    room = _room(module)
    before = ROOMS[: ROOMS.index(room)]
    for imported in _own_imports(module):
        other = _room(imported)
        assert other == room or other in before, f"{module} imports {imported}"


@pytest.mark.parametrize("module", [m for m in MODULES if _room(m) in LEAVES])
def test_leaves_import_no_room_but_errors_and_atomic_files(module):
    allowed = {*LEAVES[:2], _room(module)}
    assert {_room(imported) for imported in _own_imports(module)} <= allowed


@pytest.mark.parametrize("module", [m for m in MODULES if _room(m) in CORE])
def test_the_core_needs_jax_flax_optax_and_numpy_alone(module):
    assert {_room(imported) for imported in _own_imports(module)} <= {"errors", *CORE}
    assert _libraries(module) <= EVERYWHERE | ({"clu"} if module == "metrics" else set())


@pytest.mark.parametrize("module", MODULES)
def test_a_library_is_imported_in_its_room_alone(module):
    for library in _libraries(module) - EVERYWHERE:
        assert _room(module) in LIBRARIES[library], f"{module} imports {library}"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_imported_inside_a_function(module):
    for function in ast.walk(TREES[module]):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Import | ast.ImportFrom):
                for name in _imported(node):
                    late = (library for room, library in LATE if room == module)
                    found = any(f"{name}.".startswith(f"{library}.") for library in late)
                    assert found, ast.unparse(node)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in IMPORTERS:
                assert module in CHOOSES_MODULES, ast.unparse(node)


def _modules_after(statement):
    """The top-level modules of a new process that has run `statement`."""
    program = f"{statement}\nimport sys\nprint(*{{m.partition('.')[0] for m in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_models_and_step_pull_in_no_library_of_another_room():
    loaded = _modules_after("import flaxcls.models, flaxcls.step, flaxcls.sharding")
    assert "jax" in loaded
    # flax brings rich, and clu.metrics absl.
    assert not loaded & (set(LIBRARIES) - {"absl", "clu", "rich"})


def test_the_command_line_pulls_in_no_mode():
    loaded = _modules_after(
        "import flaxcls.main, sys\n"
        "rooms = {m for m in sys.modules if m.startswith('flaxcls.')}\n"
        "assert not rooms & {'flaxcls.train', 'flaxcls.data.loader', 'flaxcls.checkpoint'}, rooms"
    )
    heavy = {"grain", "orbax", "tensorflow", "tensorflow_datasets", "cv2", "matplotlib", "torch"}
    assert not loaded & heavy
