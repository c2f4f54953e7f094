"""The floors of the package, read from its imports: arrows point down, and a few of them are never drawn."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lumen

PACKAGE = Path(__file__).resolve().parent.parent / "lumen"

FLOORS = [  # from the ground up; a module imports from lower floors, or from its own folder
    ["errors"],
    ["schema", "hub", "text_half", "memory", "early"],
    ["ops", "formats", "names", "page", "config", "demo"],
    ["optim", "rope_spec", "expert_spec", "model_config"],
    ["spec"],
    ["nn", "text", "describe", "prequantized", "mismatch", "staging"],
    ["data", "models", "weights"],
    ["checkpoint", "embeddings", "peft_files", "decoding"],
    ["adapter", "sampling", "run"],
    ["source"],
    ["report", "objectives", "export", "speed", "loading"],
    ["capture", "profile"],
    ["probe", "trainer"],
    ["plan"],
    ["trainable"],
    ["warming"],
    ["train", "chat", "inspect", "doctor"],
]
ORACLES = {"transformers", "peft", "trl", "bitsandbytes", "accelerate", "gguf", "datasets"}
NEVERS = [  # (who, never imports)
    ("ops", {"spec", "page", "names"}),
    ("formats", {"spec", "page", "names"}),
    ("models", {"text", "data", "config"}),
    ("nn", {"text", "data", "config"}),
    ("export", {"objectives"}),
]
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    """`ops` for lumen/ops/rotary.py, `spec` for lumen/spec.py."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imports(path: Path) -> set[tuple[str, ...]]:
    """Dotted names that a file imports, as tuples; `from lumen import ops` counts as lumen.ops."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            parts = tuple(node.module.split("."))
            found |= {(*parts, alias.name) for alias in node.names} if parts == ("lumen",) else {parts}
    return found


def floor(name: str) -> int:
    return next(index for index, names in enumerate(FLOORS) if name in names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = part(path)
    if path == PACKAGE / "__init__.py" or path.name == "__main__.py":  # doors: they may open to everything
        return
    for name in imports(path):
        if name[0] == "lumen" and name[1] != own:
            assert floor(name[1]) < floor(own), f"{own} imports {'.'.join(name)}, which is not below it"


@pytest.mark.parametrize(("who", "never"), NEVERS)
def test_what_must_not_know_of_each_other_does_not(who, never):
    for path in MODULES:
        if part(path) == who:
            assert not {name[1] for name in imports(path) if name[0] == "lumen" and len(name) > 1} & never, path


def test_the_package_shows_what_is_public_alone():
    assert "finetune" in dir(lumen) and "import_module" not in dir(lumen)


def test_oracles_are_never_imported():
    for path in MODULES:
        assert not {name[0] for name in imports(path)} & ORACLES, path


def test_the_hub_alone_reaches_a_network():
    networks = {"huggingface_hub", "requests", "httpx", "httpx2", "urllib", "urllib3", "http", "socket", "aiohttp"}
    importers = {part(path) for path in MODULES if networks & {name[0] for name in imports(path)}}
    assert importers == {"hub"}


def test_triton_is_named_in_ops_alone():
    """But for what the command does before PyTorch is there, and `ops` with it."""
    assert {part(path) for path in MODULES if "triton" in {name[0] for name in imports(path)}} <= {"ops", "early"}


def test_nothing_imports_the_training_loop():
    importers = {part(path) for path in MODULES if ("lumen", "train") in {name[:2] for name in imports(path)}}
    assert importers <= {"__init__.py", "__init__", "demo"}
    assert {part(path) for path in MODULES if ("lumen", "trainer") in {name[:2] for name in imports(path)}} == {"train"}


def test_only_verbs_read_arguments_or_exit():
    for path in MODULES:
        if path.stem in ("train", "chat", "inspect", "plan", "doctor", "__main__"):
            continue
        text = path.read_text("utf-8")
        assert "sys.argv" not in text and "sys.exit" not in text, path


def test_the_package_imports_without_triton_pillow_transformers_and_without_a_model_being_built():
    hide = "import sys; sys.modules |= dict.fromkeys(['triton', 'PIL', 'transformers', 'sentencepiece', 'pyarrow'])"
    public = "import lumen; [getattr(lumen, name) for name in lumen.__all__]"
    subprocess.run([sys.executable, "-c", f"{hide}; {public}"], check=True)


def test_the_package_alone_needs_no_dependency_and_is_imported_at_once():
    names = "assert set(lumen.__all__) < set(dir(lumen)) and not hasattr(lumen, 'absent')"
    nothing = "assert not {'torch', 'numpy', 'msgspec', 'rich', 'tokenizers'} & set(sys.modules), sys.modules"
    subprocess.run([sys.executable, "-c", f"import sys, lumen; {names}; {nothing}"], check=True)


def test_where_a_dependency_is_missing_the_doctor_still_says_so():
    told = subprocess.run([sys.executable, "-c", WITHOUT_MSGSPEC], capture_output=True, text=True)
    assert (told.returncode, told.stderr) == (1, "")
    assert "lumen cannot be imported here: ModuleNotFoundError" in told.stdout
    assert "-m pip install 'msgspec>=" in told.stdout and "torch" not in told.stdout


WITHOUT_MSGSPEC = """
import sys
from importlib import metadata

found = metadata.version

def version(name):
    if name == "msgspec":
        raise metadata.PackageNotFoundError(name)
    return found(name)

metadata.version, sys.modules["msgspec"] = version, None
from lumen.doctor import main
sys.exit(main([]))
"""


def test_a_run_starts_without_what_it_does_not_need_yet():
    # each takes a tenth of a second to several
    late = {"matplotlib", "jinja2", "PIL", "pyarrow", "huggingface_hub", "torch._dynamo", "torch._inductor", *ORACLES}
    code = f"import sys, lumen.train; late = {late!r} & set(sys.modules); assert not late, late"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_module_opens_with_what_it_is_for():
    for path in MODULES:
        assert ast.get_docstring(ast.parse(path.read_text("utf-8"))), path
