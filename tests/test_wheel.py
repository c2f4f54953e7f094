"""What an installed lumen brings along."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_wheel_holds_the_pages_the_recipes_and_the_demo(tmp_path):
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], cwd=ROOT, check=True)
    [wheel] = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"lumen/model_specs/{page.name}" for page in (ROOT / "model_specs").glob("*.toml")}
    wanted |= {f"lumen/model_specs/chat/{page.name}" for page in (ROOT / "model_specs/chat").glob("*.toml")}
    assert "lumen/model_specs/chat/chatml.toml" in wanted
    wanted |= {str(file.relative_to(ROOT)) for file in (ROOT / "lumen").rglob("*") if file.suffix in (".py", ".toml")}
    wanted |= {f"lumen/demo/base/{name}" for name in ("model.safetensors", "config.json", "tokenizer.json")}
    wanted |= {"lumen/demo/data/train.jsonl", "lumen/demo/data/heldout.jsonl"}
    assert wanted <= names
    assert not [name for name in names if name.startswith("tests/")]


def test_an_installed_wheel_finds_its_pages_and_its_demo(tmp_path):
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], cwd=ROOT, check=True)
    [wheel] = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import lumen, lumen.demo; "
        "assert lumen.__file__.startswith(sys.argv[1]); "
        "print(lumen.load_family(lumen.demo.demo_folder('lumen-demo')).name)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "site")], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == "llama3.1", done.stderr
