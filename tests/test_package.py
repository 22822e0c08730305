"""What the package promises as a whole: which way imports point, and what loads when."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import deformconv
from deformconv.installation import command

ROOT = Path(__file__).parents[1]
SOURCE = Path(deformconv.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

MXNET = ("mxnet==1.9.1", "numpy<1.24")
FRAMEWORKS = ("torch", "torchvision", "triton", "mxnet", "jax", "jaxlib", "flax", "equinox", "optax", "keras", "tensorflow")
# The rooms of JAX's and Keras' world: a room is called as its library's module and its extra are. And the library's own name.
YOUNG = {"jax": "JAX", "flax": "Flax", "equinox": "Equinox", "keras": "Keras"}

# A room may import from itself and from those further in.
DEPTH = {
    "errors": 0,
    "files": 0,
    "accuracy": 0,
    "installation": 0,
    "runtime": 1,
    "sampling": 2,
    "ops": 3,
    "dispatch": 4,
    "numpy": 5,
    "functional": 6,
    "deformconv": 7,  # the root's public names
    "torch": 8,
    "gluon": 8,
    "jax": 8,
    "flax": 9,
    "equinox": 9,
    "keras": 9,
    "convert": 9,
    "bench": 10,
    "vision": 10,
    "plots": 11,
    "studies": 12,
    "cli": 13,
}
# The root's functions hand tensors on to the torch room and JAX's arrays to theirs, when they are given some.
# So does `look`, whose type the root names for type checkers.
EXCEPTIONS = {("functional", "torch"), ("functional", "jax"), ("deformconv", "plots")}
# The rooms that nobody needs a framework or an extra for.
PLAIN = (
    "errors",
    "files",
    "accuracy",
    "installation",
    "runtime",
    "sampling",
    "ops",
    "dispatch",
    "numpy",
    "functional",
    "convert",
    "cli",
)
# But for these modules, which the others of their room load inside of functions.
OF_A_FRAMEWORK = {
    "deformconv.cli.look",
    "deformconv.cli.models",
    "deformconv.convert.attention_kernels",
    "deformconv.convert.checks",
    "deformconv.convert.conversion",
    "deformconv.convert.detectors",
    "deformconv.convert.detectors.detector",
    "deformconv.convert.detectors.names",
    "deformconv.convert.detectors.numbers",
    "deformconv.convert.detectors.origin",
    "deformconv.convert.detectors.parts",
    "deformconv.convert.internimage",
    "deformconv.convert.kornia",
    "deformconv.convert.mmcv_kernels",
    "deformconv.convert.names",
    "deformconv.convert.pools",
    "deformconv.convert.torchvision_kernels",
    "deformconv.convert.torchvision_modules",
}
# And these, which are written in Triton, as what they import is.
OF_TRITON = {
    "deformconv.ops.aggregate.gpu_kernels",
    "deformconv.ops.attention.gpu_kernels",
    "deformconv.ops.conv.gpu_kernels",
    "deformconv.ops.roi_pool.gpu_kernels",
    "deformconv.ops.taps.gpu_kernels",
    "deformconv.runtime.triton_product",
    "deformconv.runtime.triton_turned",
    "deformconv.sampling.triton",
    "deformconv.sampling.triton_levels",
    "deformconv.sampling.triton_lists",
}


def name_of(file: Path) -> str:
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in FILES}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "deformconv"


def imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, ast.stmt]]:
    """Every module that a file imports, wherever in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [node.module])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield (whole if whole in MODULES else base), node


def is_neutral(module: str) -> bool:
    """Whether a module serves any operator, and so must not know one."""
    room, *file = module.split(".")[1:] or [""]
    by_file = {
        "ops": ["operator", "window"],
        "gluon": ["arrays", "calls", "custom"],
        "jax": ["calls", "ffi", "gate", "kernels", "labels", "native", "primitives"],
    }
    if room == "torch":
        return len(file) == 1 and file != ["conv"]
    if room == "ops" and file[:1] == ["taps"]:
        return True
    return room in ("dispatch", "numpy", "runtime", "sampling") or file in [[name] for name in by_file.get(room, [])]


def test_what_serves_any_operator_imports_none():
    neutral = [module for module in MODULES if is_neutral(module)]
    assert {"deformconv.torch.calls", "deformconv.numpy.run", "deformconv.gluon.custom", "deformconv.jax.kernels"} < set(
        neutral
    )
    wrong = []
    for module in neutral:
        for target, node in imported(ast.parse(MODULES[module].read_text()), module, MODULES[module].name == "__init__.py"):
            if target.startswith(("deformconv.ops.conv", "deformconv.torch.conv", "deformconv.torch.functional")):
                wrong.append(f"{MODULES[module]}:{node.lineno} imports {target}")
    assert not wrong


def test_imports_point_inward():
    wrong = []
    for module, file in MODULES.items():
        here = room(module)
        assert here in DEPTH, f"{file}: give the room {here} a place in DEPTH"
        for target, node in imported(ast.parse(file.read_text()), module, file.name == "__init__.py"):
            if target.split(".")[0] != "deformconv":
                continue
            there = room(target)
            inward = there == here or DEPTH[there] < DEPTH[here]
            if not inward and (here, there) not in EXCEPTIONS:
                wrong.append(f"{file}:{node.lineno} {here} imports {there}")
    assert not wrong


def test_no_file_imports_what_imports_it():
    """Not even through others, or within functions: a circle of files is one file."""
    graph = {
        module: {
            target
            for target, _ in imported(ast.parse(file.read_text()), module, file.name == "__init__.py")
            if target in MODULES and target != module
        }
        for module, file in MODULES.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the files


BLOCKS = (ast.For, ast.While, ast.If, ast.With, ast.Try)


def deepest(node: ast.AST) -> int:
    """How many blocks are within each other; an elif is not within its if."""
    most = 0
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                is_elif = isinstance(node, ast.If) and name == "orelse" and isinstance(child, ast.If)
                most = max(most, deepest(child) + (isinstance(child, BLOCKS) and not is_elif))
    return most


def test_functions_can_be_read_at_once():
    """60 lines and 4 levels are the most; the sentences of the specs are longer. A kernel has at most 12 arguments."""
    wrong = []
    for module, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            documented = ast.get_docstring(node) is not None
            lines = node.body[-1].end_lineno - node.body[documented and len(node.body) > 1].lineno + 1
            kernel = any(isinstance(mark, ast.Name) and mark.id in ("kernel", "device") for mark in node.decorator_list)
            if lines > 60 and not module.endswith(".spec"):
                wrong.append(f"{file}:{node.lineno} {node.name} has {lines} lines")
            if deepest(node) > 4:
                wrong.append(f"{file}:{node.lineno} {node.name} is {deepest(node)} levels deep")
            if kernel and len(node.args.args) > 12:
                wrong.append(f"{file}:{node.lineno} {node.name} has {len(node.args.args)} arguments")
    assert not wrong, "\n".join(wrong)


def test_the_exceptions_are_lazy():
    for node in ast.parse((SOURCE / "functional.py").read_text()).body:
        targets = [target for target, _ in imported(node, "deformconv.functional", False)]
        outermost = isinstance(node, (ast.Import, ast.ImportFrom))
        rooms = ("deformconv.torch", "deformconv.jax")
        assert not (outermost and any(target.startswith(rooms) for target in targets))


def test_frameworks_stay_in_their_rooms():
    """Outside of its rooms a framework is imported inside of functions only, if at all."""
    for module, file in MODULES.items():
        if room(module) not in (*PLAIN, "deformconv") or module in OF_A_FRAMEWORK | OF_TRITON:
            continue
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                tops = {target.split(".")[0] for target, _ in imported(node, module, False)}
                assert not tops & set(FRAMEWORKS), f"{file}:{node.lineno}"


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_loads_no_framework_and_no_numba():
    heavy = ("numba", "llvmlite", "matplotlib", "array_api_compat", *FRAMEWORKS)
    code = f"import deformconv, sys; print([name for name in {heavy} if name in sys.modules])"
    assert run_python(code) == "[]"


def test_import_loads_what_a_call_needs_at_the_first_call():
    code = (
        "import sys, deformconv; print([m for m in sys.modules if m.startswith('deformconv.')]);"
        "import numpy as np; x = np.ones((1, 1, 2, 2));"
        "print(deformconv.deform_conv(x, np.zeros((1, 2, 2, 2)), x[..., :1, :1], backend='reference').sum());"
        "print('deform_conv' in vars(deformconv), 'deform_roi_pool' in vars(deformconv))"
    )
    assert run_python(code).splitlines() == ["['deformconv.errors']", "4.0", "True False"]


def test_the_torch_room_loads_what_a_call_needs_at_the_first_call():
    pytest.importorskip("torch")
    lazy = (
        "functional", "numpy.run", "runtime.openmp", "torch.attention.functional", "torch.attention.modules",
        "torch.roi_pool.functional", "torch.roi_pool.modules",
    )  # fmt: skip
    code = (
        f"import sys, deformconv.torch; print([m for m in {lazy} if f'deformconv.{{m}}' in sys.modules]);"
        "print(dir(deformconv.torch) == sorted(deformconv.torch.__all__));"
        "from deformconv.torch import *; print(DeformRoIPool is deformconv.torch.DeformRoIPool, deform_roi_pool.__name__);"
        "print(hasattr(deformconv.torch, 'deform_conv4d'))"
    )
    assert run_python(code).splitlines() == ["[]", "True", "True deform_roi_pool", "False"]


def test_completing_a_name_loads_nothing():
    code = (
        "import deformconv, sys; [getattr(deformconv, name) for name in dir(deformconv)];"
        "print([name for name in ('numba', 'torch') if name in sys.modules])"
    )
    assert run_python(code) == "[]"


def without(*packages: str) -> str:
    """The beginning of a program to which these packages are not installed."""
    return f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""


WITHOUT_FRAMEWORKS = without(*FRAMEWORKS)


def test_everything_but_their_rooms_works_without_frameworks():
    apart = OF_A_FRAMEWORK | OF_TRITON
    modules = [m for m in MODULES if room(m) in PLAIN and m not in apart and not m.endswith("__main__")]
    code = f"""{WITHOUT_FRAMEWORKS}
import importlib
import numpy as np
import deformconv
for module in {modules}:
    importlib.import_module(module)
x, offset, weight = np.ones((1, 2, 4, 4)), np.zeros((1, 2, 4, 4)), np.ones((3, 2, 1, 1))
for backend in (None, "portable", "reference"):
    assert (deformconv.deform_conv(x, offset, weight, backend=backend) == 2).all()
gradients = deformconv.deform_conv_backward(np.ones((1, 3, 4, 4)), x, offset, weight)
assert (gradients.weight == 16).all()
print(deformconv.explain(x, offset, weight).splitlines()[1])
assert not [name for name in ("torch", "triton", "mxnet") if name in sys.modules]
"""
    assert run_python(code) == "forward: cpu"


@pytest.mark.slow
def test_the_torch_room_loads_triton_for_calls_on_a_gpu_alone():
    pytest.importorskip("torch")
    code = """
import sys, torch, deformconv, deformconv.torch
x, offset, weight = torch.rand(1, 2, 5, 5), torch.zeros(1, 18, 3, 3), torch.rand(3, 2, 3, 3, requires_grad=True)
deformconv.torch.deform_conv2d(x, offset, weight).sum().backward()
deformconv.explain(x, offset, weight)
print("triton" in sys.modules)
"""
    assert run_python(code) == "False"


def test_the_torch_room_without_torch_tells_how_to_get_it():
    code = f"""{WITHOUT_FRAMEWORKS}
try:
    import deformconv.torch
except ModuleNotFoundError as error:
    print(error)
"""
    expected = "deformconv.torch needs PyTorch, which is not installed: " + command("torch", "torch")
    assert run_python(code) == expected


def test_conversions_without_torch_tell_how_to_get_it():
    code = f"""{WITHOUT_FRAMEWORKS}
import numpy as np
from deformconv.convert import accelerate_torchvision, accelerate_transformers, layer_from_mxnet, replace_layers
arrays = {{"weight": np.ones((4, 3, 3, 3)), "offset_weight": np.ones((18, 3, 3, 3))}}
for call in (lambda: replace_layers(None), lambda: layer_from_mxnet(arrays), accelerate_torchvision, accelerate_transformers):
    try:
        call()
    except ModuleNotFoundError as error:
        print(error)
"""
    expected = "deformconv.torch needs PyTorch, which is not installed: " + command("torch", "torch")
    assert run_python(code).splitlines() == [expected] * 4


def test_looking_without_torch_tells_how_to_get_it():
    code = f"""{WITHOUT_FRAMEWORKS}
import deformconv
for call in (lambda: deformconv.look(None, None), lambda: deformconv.plots.record, lambda: deformconv.plots.OffsetMonitor):
    try:
        call()
    except ModuleNotFoundError as error:
        print(error)
"""
    expected = "deformconv.torch needs PyTorch, which is not installed: " + command("torch", "torch")
    assert run_python(code).splitlines() == [expected] * 3


def test_the_gluon_room_without_mxnet_tells_how_to_get_it():
    code = f"""{WITHOUT_FRAMEWORKS}
try:
    import deformconv.gluon
except ModuleNotFoundError as error:
    print(error)
"""
    expected = "deformconv.gluon needs MXNet, which is not installed: " + command("gluon", *MXNET)
    assert run_python(code) == expected


def test_the_gluon_room_with_too_new_a_numpy_tells_what_it_needs(tmp_path):
    """MXNet then fails while it is imported, for one of several names."""
    (tmp_path / "mxnet.py").write_text("import numpy\nnumpy.a_name_that_was_dropped\n")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import numpy
for version in ("1.24.0", "2.3.1", "1.23.5"):
    numpy.__version__ = version
    try:
        import deformconv.gluon
    except (ImportError, AttributeError) as error:
        print(error)
"""
    refused = (
        "deformconv.gluon needs MXNet, and MXNet does not load with NumPy {}; it needs one below 1.24, in an environment of "
        "its own: " + command("gluon", *MXNET)
    )
    expected = [refused.format(version) for version in ("1.24.0", "2.3.1")]
    assert run_python(code).splitlines() == [*expected, "module 'numpy' has no attribute 'a_name_that_was_dropped'"]


@pytest.mark.parametrize("name", YOUNG)
def test_a_young_room_without_its_library_tells_how_to_get_it(name):
    code = f"""{WITHOUT_FRAMEWORKS}
try:
    import deformconv.{name}
except ModuleNotFoundError as error:
    print(error)
"""
    needs = f"deformconv.{name} needs {YOUNG[name]}, which is not installed: {command(name, name)}"
    assert run_python(code) == needs


@pytest.mark.slow
def test_keras_without_its_backend_tells_how_to_choose_one(tmp_path):
    """As after a first `pip install`, which brings Keras alone: it asks for TensorFlow unless it is told otherwise."""
    if find_spec("keras") is None:
        pytest.skip("needs keras")
    code = f"""{without("tensorflow")}
import os
os.environ |= {{"KERAS_BACKEND": "tensorflow", "KERAS_HOME": {str(tmp_path)!r}}}
try:
    import deformconv.keras
except ModuleNotFoundError as error:
    print(error)
"""
    assert run_python(code) == (
        "Keras computes by tensorflow here, which is not installed: install it, or set the environment variable KERAS_BACKEND "
        "to one that is, before Keras is imported: tensorflow, jax, torch, openvino or numpy."
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jax", "flax", "equinox"])
def test_the_rooms_of_jax_need_no_other_framework(name):
    """Where PyTorch is there, as in the environment of these tests, it is neither loaded nor asked for."""
    if find_spec(name) is None:
        pytest.skip(f"needs {name}")
    code = f"""{without("torch", "torchvision", "triton", "mxnet", "tensorflow", "keras")}
import deformconv.{name}
import jax
import numpy as np
from deformconv.jax import deform_conv2d
random = np.random.default_rng(0)
x, offset, weight = (random.normal(size=shape).astype("f4") for shape in ((1, 3, 8, 8), (1, 18, 6, 6), (4, 3, 3, 3)))
found = jax.jit(deform_conv2d)(x, offset, weight)
gradient = jax.grad(lambda offset: deform_conv2d(x, offset, weight).sum())(offset)
print(np.array_equal(found, deformconv.deform_conv(x, offset, weight)), gradient.shape)
"""
    assert run_python(code) == "True (1, 18, 6, 6)"


def test_public_names():
    assert deformconv.__all__ == [
        "BackendError",
        "Gradients",
        "ShapeError",
        "__version__",
        "deform_aggregate",
        "deform_aggregate_backward",
        "deform_attention",
        "deform_attention_backward",
        "deform_conv",
        "deform_conv_backward",
        "deform_roi_pool",
        "deform_roi_pool_backward",
        "explain",
        "get_num_threads",
        "look",
        "set_num_threads",
    ]
    assert dir(deformconv) == sorted(deformconv.__all__)
    for name in deformconv.__all__:
        value = getattr(deformconv, name)
        assert name == "__version__" or value.__doc__, name
    with pytest.raises(AttributeError, match="module 'deformconv' has no attribute 'deform_convolution'"):
        deformconv.deform_convolution  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize(
    "framework, call",
    [
        ("torch", "torch.DeformConv2d"),
        ("mxnet", "gluon.ModulatedDeformableConvolution"),
        ("jax", "jax.deform_conv2d"),
        ("flax", "flax.DeformConv"),
        ("equinox", "equinox.DeformConv2d"),
        ("keras", "keras.DeformConv2D"),
    ],
)
def test_the_frameworks_rooms_can_be_reached_from_the_root(framework, call):
    if find_spec(framework) is None:
        pytest.skip(f"needs {framework}")
    assert run_python(f"import deformconv; print(deformconv.{call}.__name__)") == call.partition(".")[2]


@pytest.mark.parametrize("call", ["convert.replace_layers", "convert.read_params", "plots.sampling_points"])
def test_the_other_rooms_can_be_reached_from_the_root_and_load_no_framework(call):
    code = f"""
import deformconv, sys
assert not [name for name in ("deformconv.convert", "deformconv.plots") if name in sys.modules]
print(deformconv.{call}.__name__, [name for name in ("matplotlib", *{FRAMEWORKS}) if name in sys.modules])
"""
    assert run_python(code) == f"{call.partition('.')[2]} []"


@pytest.mark.parametrize("module", [m for m in MODULES if not m.endswith("__main__")])
def test_all_lists_what_is_there(module):
    if room(module) not in (*PLAIN, "deformconv") or module in OF_A_FRAMEWORK:
        # Not `importorskip(module)` itself, which would hide a module that is broken.
        extras = ("mxnet", "mlxtend", "rich") if "gluon" in module else ("torch", "matplotlib", "mlxtend", "rich")
        if room(module) in YOUNG:
            extras = (room(module),)
        extras += ("torchvision", "lightning_fabric") if "studies.detection" in module else ()
        for extra in extras:
            if find_spec(extra) is None:
                pytest.skip(f"needs {extra}")
    if module in OF_TRITON and find_spec("triton") is None:
        pytest.skip("needs triton")
    names = getattr(importlib.import_module(module), "__all__", [])
    missing = [name for name in names if not hasattr(sys.modules[module], name)]
    assert not missing
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.13"])
@pytest.mark.parametrize(
    ("files", "extras"),
    [
        (("constraints.txt",), ("dev", "demo")),
        (("constraints-gluon.txt",), ("dev-gluon",)),
        # The environment stands on that of constraints.txt.
        (("constraints.txt", "constraints-jax.txt"), ("jax", "flax", "equinox", "keras")),
    ],
)
def test_what_make_installs_is_pinned(files, extras, python):
    """Every dependency that pyproject.toml names: a new version cannot change what the suite sees from one day to the next."""
    tomllib = pytest.importorskip("tomllib", reason="pyproject.toml is read with Python 3.11's library")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def meant(lines):
        found = map(Requirement, filter(None, (line.partition("#")[0].strip() for line in lines)))
        return [one for one in found if one.marker is None or one.marker.evaluate({"python_version": python})]

    def asked(names):
        for requirement in (one for name in names for one in meant(project["optional-dependencies"][name])):
            if requirement.name == "deformconv":
                yield from asked(requirement.extras)
            else:
                yield requirement

    pinned = meant([line for file in files for line in (ROOT / file).read_text().splitlines()])
    pins = {canonicalize_name(pin.name): pin for pin in pinned}
    assert len(pins) == len(pinned)
    for requirement in (*meant(project["dependencies"]), *asked(extras)):
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{files[-1]} does not pin {requirement.name}"
        (exactly,) = pin.specifier
        assert exactly.operator == "==" and exactly.version in requirement.specifier, f"{pin} is not {requirement}"


def test_is_typed():
    assert (SOURCE / "py.typed").exists()


def test_errors_are_also_the_builtin_ones():
    assert issubclass(deformconv.ShapeError, ValueError)
    assert issubclass(deformconv.BackendError, RuntimeError)
