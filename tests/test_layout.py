"""The structure of the tests: shared helpers are in `tests.support`, and folders mirror the product."""

import ast
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
NO_MIRROR = {"data", "pins", "support"}  # input files, behaviour of libraries, shared helpers


def imported(path: Path) -> set[str]:
    """List the modules and names that a file imports, each as one dotted name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_no_module_imports_a_test_module() -> None:
    for path in TESTS.rglob("*.py"):
        tests = {
            name
            for name in imported(path)
            if name.startswith("tests.") and any(p[:5] == "test_" for p in name.split("."))
        }
        assert not tests, f"{path.relative_to(ROOT)} imports {tests}. Remedy: move shared helpers to tests/support."


def test_every_folder_of_tests_mirrors_one_of_the_product() -> None:
    folders = {path.parent.relative_to(TESTS) for path in TESTS.rglob("test_*.py")}
    assert [str(f) for f in folders if f.parts and f.parts[0] not in NO_MIRROR and not (ROOT / f).is_dir()] == []
