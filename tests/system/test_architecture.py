"""The floors of the library, and how many doors its hall has."""

import shutil

import floors


def test_imports_go_to_lower_floors_only():
    assert floors.violations() == []
    assert len(floors.FLOORS) <= 8


def test_a_planted_import_upwards_is_found(tmp_path):
    shutil.copytree(floors.ROOT / "lora_null", tmp_path / "lora_null", ignore=shutil.ignore_patterns("*.so", "__py*"))
    planted = tmp_path / "lora_null" / "ops" / "reference.py"
    for line in ("from ..adapters.layer import adapter_layers", "import lora_null.cli", "from lora_null import peft"):
        before = planted.read_text()
        planted.write_text(before.replace("import torch\n", f"import torch\n\ndef late():\n    {line}\n", 1))
        assert [wrong for wrong in floors.violations(tmp_path) if wrong.startswith("lora_null/ops/reference.py")], line
        planted.write_text(before)
    assert floors.violations(tmp_path) == []


def test_files_of_one_package_form_floors_too():
    below: dict[str, set[str]] = {}
    for module, path, is_package in floors.modules():
        if is_package:  # hands the names of its files through
            continue
        own = floors.package_of(module)
        for target, _ in floors.imports(path, module, is_package):
            if floors.package_of(target) == own and target != module:
                below.setdefault(module, set()).add(target)
    while below:
        lowest = [module for module, targets in below.items() if not targets & set(below)]
        assert lowest, f"these files import each other in a circle: {below}"
        for module in lowest:
            del below[module]


def test_the_hall_has_few_doors():
    # what Python imports by name: no marker for type checkers, no cache, no compiled file
    top = [p.name for p in (floors.ROOT / "lora_null").iterdir() if not p.name.startswith("__py")]
    top = [name for name in top if not name.endswith((".so", "py.typed"))]
    assert len(top) <= 16, sorted(top)


def test_the_table_for_contributors_is_made_from_the_same_data():
    text = (floors.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert floors.table() in text, "run python tests/support/floors.py and paste its table into CONTRIBUTING.md"
