"""The house: imports run downward, importing is light, the doors at the root, nothing too large."""

import ast
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ardrag_rl"

# from the bottom up; a part may import its own files and parts below it
ORDER = (
    *("flow", "control", "media", "hub", "codec", "rollout"),
    *("rewards", "policies", "envs", "generation", "interaction", "training", "distill", "metrics"),
)
# what a part must not know although it lies below, nor load lazily
STRANGERS = {
    "flow": set(ORDER),
    "control": set(ORDER),
    "media": set(ORDER),
    "policies": {"envs", "rewards", "codec", "media"},
    "rewards": {"codec", "rollout", "policies", "envs"},
    "envs": {"policies", "rollout"},
}
# numerical core: torch and the standard library only
TORCH_ONLY = ("flow", "control", "rollout")
# what `import ardrag_rl` must not load
HEAVY = ("trl", "ray", "open_clip", "matplotlib", "diffusers", "transformers", "cotracker", "peft")


@cache
def modules():
    """Name -> file of every module of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def tree(name):
    return ast.parse(modules()[name].read_text())


def hints_only(node):
    """Whether this is `if TYPE_CHECKING:`."""
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imported(node, with_hints=False):
    """Every imported name below a node, dotted: `from a.b import c` is a.b.c."""
    for child in ast.iter_child_nodes(node):
        if hints_only(child) and not with_hints:
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from ("." * child.level + f"{child.module or ''}.{alias.name}" for alias in child.names)
        yield from imported(child, with_hints)


def target(name):
    """The module of the package that an imported name is, or is in."""
    while name and name not in modules():
        name = name.rpartition(".")[0]
    return name


def part(name):
    """ardrag_rl.rewards.motion -> rewards."""
    return name.split(".")[1] if "." in name else ""


INNER = [n for n in modules() if n != "ardrag_rl"]  # the root is the door, it may show everything


@pytest.mark.parametrize("name", INNER)
def test_imports_run_downward(name):
    for other in imported(tree(name), with_hints=True):
        assert not other.startswith("."), f"{name} imports {other}: imports are absolute."
        if not other.startswith("ardrag_rl"):
            continue
        upper, lower = part(name), part(target(other))
        assert lower, f"{name} imports the package's root: import the file that has what it needs."
        for p in (upper, lower):
            assert p in ORDER, f"{p} has no place in the house yet: give it one in ORDER."
        assert ORDER.index(lower) <= ORDER.index(upper), f"{name} imports {other}, which lies above it."
        if lower != upper:
            assert lower not in STRANGERS.get(upper, ()), f"{name} imports {other}: {upper} knows no {lower}."


def test_no_two_files_import_each_other():
    edges = {n: {target(o) for o in imported(tree(n)) if o.startswith("ardrag_rl")} - {n} for n in INNER}
    done = set()

    def visit(name, path):
        assert name not in path, "imports in a circle: " + " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        for other in sorted(edges.get(name, ())):
            visit(other, [*path, name])
        done.add(name)

    for name in edges:
        visit(name, [])


@pytest.mark.parametrize("name", TORCH_ONLY)
def test_the_core_knows_torch_only(name):
    outside = {o.split(".")[0] for o in imported(tree(f"ardrag_rl.{name}"))}
    assert outside - set(sys.stdlib_module_names) <= {"torch", "ardrag_rl"}


def test_import_is_light_and_registers_the_environment():
    code = f"""if True:
        import sys, gymnasium, ardrag_rl
        print([m for m in {HEAVY} if m in sys.modules], gymnasium.spec("ARDrag-v0").id)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[] ARDrag-v0"


def test_the_public_names_are_there():
    import ardrag_rl

    for name in ardrag_rl.__all__:
        assert getattr(ardrag_rl, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ardrag_rl.nothing  # noqa: B018


@pytest.mark.parametrize("name", ["envs", "rewards", "policies"])
def test_doors_at_the_root(name):
    link = ROOT / name
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("not a checkout")
    assert link.is_symlink() and link.readlink() == Path("ardrag_rl") / name
    assert (link / "__init__.py").is_file()


@pytest.mark.parametrize("name", modules())
def test_house_rules(name):
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("print", "eval", "exec"), f"{name}:{node.lineno} calls {called}."
            if called == "torch.load":
                safe = [k for k in node.keywords if k.arg == "weights_only" and ast.unparse(k.value) == "True"]
                assert safe, f"{name}:{node.lineno} loads without weights_only=True."
        if isinstance(node, ast.ExceptHandler):
            silent = len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
            broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            assert not (silent and broad), f"{name}:{node.lineno} swallows every error."
    assert not {"pickle", "dill", "cloudpickle"} & {o.split(".")[0] for o in imported(tree(name))}


@pytest.mark.parametrize("name", modules())
def test_every_file_says_what_it_is(name):
    path = modules()[name]
    assert not path.read_text().strip() or ast.get_docstring(tree(name)), f"{path.name} has no docstring."
    lines = len(path.read_text().splitlines())
    if lines > 400:
        warnings.warn(f"{path.relative_to(ROOT)} has {lines} lines; a file has one noun.", stacklevel=1)
    assert lines <= 420


def test_assets_are_small():
    size = sum(p.stat().st_size for p in (PACKAGE / "assets").rglob("*") if p.is_file())
    assert size < 20e6, f"the assets weigh {size / 1e6:.1f} MB: expected below 20."
