"""The house: which wing may import which, that no module imports itself by a detour, and no test module another.

``python tests/test_architecture.py`` prints its size: modules, the longest of them, the longest class.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "st_corrector"
FLOORS = (  # from the ground up; a module imports from its own wing and from the floors below
    ("errors", "_version"),
    ("storage", "runtime"),
    ("correctors", "data"),
    ("cache",),
    ("search",),
    ("teachers",),
    ("negatives",),
    ("losses",),
    ("evaluation", "carry_over", "mining"),
    ("stores",),
    ("reporting",),
    ("training",),
    ("cli",),
)
FLOOR_OF = {wing: floor for floor, wings in enumerate(FLOORS) for wing in wings}


def name_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(name):
    """The modules of the package that a module names in an import, in functions too; but not for its types alone."""
    path, found = MODULES[name], set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found |= {each if (each := f"{source}.{alias.name}") in MODULES else source for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {each for each in found if each in MODULES} - {name}


IMPORTS = {name: imports_of(name) for name in MODULES}


def wing_of(name):
    return [*name.split("."), ""][1]


def test_every_module_stands_in_a_wing():
    assert {wing_of(name) for name in MODULES} == {"", *FLOOR_OF}
    assert all(len(name.split(".")) <= 3 for name in MODULES), "wings have no wings"


def test_imports_go_down():
    up = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in others
        if wing_of(name) and wing_of(other) and wing_of(name) != wing_of(other)
        if FLOOR_OF[wing_of(other)] >= FLOOR_OF[wing_of(name)]
    ]
    assert not up, "\n".join(sorted(up))


def cycles():
    """Sets of modules that import one another."""
    reached = {}

    def reach(name):
        if name not in reached:
            reached[name], waiting = set(), [name]
            while waiting:
                for other in IMPORTS[waiting.pop()] - reached[name]:
                    reached[name].add(other)
                    waiting.append(other)
        return reached[name]

    return {frozenset(other for other in reach(name) if name in reach(other)) for name in MODULES} - {frozenset()}


def test_no_module_imports_itself_by_a_detour():
    assert not cycles(), "\n".join(" ↔ ".join(sorted(each)) for each in cycles())


def test_nobody_reaches_into_the_corrected_corpus():
    """Loss, checkpoints, recorder and callbacks speak to it, and not to its search, overlay or divergence watch."""
    inside = {"search", "overlay", "divergence_watch"}
    for name, path in MODULES.items():
        if wing_of(name) in ("losses", "training") and not name.endswith(".corrected_corpus"):
            used = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
            assert not used & inside, f"{name} uses {used & inside}"


def test_no_module_is_left_behind():
    """Every module is imported by another, or is where users come in: the root's names, the command line."""
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text())
    at_root = {f"st_corrector.{node.module}" for node in ast.walk(stub) if isinstance(node, ast.ImportFrom)}
    used = at_root.union(*IMPORTS.values(), {"st_corrector", "st_corrector.cli", "st_corrector.cli.__main__"})
    wings = {f"st_corrector.{wing}" for wing in FLOOR_OF}
    assert not MODULES.keys() - used - wings


def test_each_wing_says_what_it_is():
    for wing in FLOOR_OF.keys() - {"_version"}:
        assert ast.get_docstring(ast.parse((MODULES[f"st_corrector.{wing}"]).read_text())), wing


def named_in_imports(path):
    """The last part of every module's name in the imports of a file, and of every name it takes from one."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found |= {(node.module or "").rpartition(".")[2], *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name.rpartition(".")[2] for alias in node.names}
    return found


def test_no_test_module_imports_another():
    """What they share is in ``tests/support`` and ``conftest.py``, which do not import them either."""
    tests = {path.stem: path for path in sorted((ROOT / "tests").rglob("test_*.py"))}
    assert len(tests) > 40 and len(tests) == len(list((ROOT / "tests").rglob("test_*.py"))), "names are unique"
    found = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (ROOT / "tests").rglob("*.py")
        for name in named_in_imports(path) & tests.keys()
    }
    assert not found, "\n".join(sorted(found))


if __name__ == "__main__":
    lines = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    classes = {
        f"{name}.{node.name}": node.end_lineno - node.lineno + 1
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    print(f"{len(MODULES)} modules, {sum(lines.values()):,} lines, {sum(map(len, IMPORTS.values()))} imports")
    for kind, sizes in (("modules", lines), ("classes", classes)):
        longest = sorted(sizes, key=lambda each: -sizes[each])[:3]
        print(f"longest {kind}: " + ", ".join(f"{each} {sizes[each]}" for each in longest))
    print(f"import cycles: {len(cycles())}")
