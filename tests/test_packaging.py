"""What is handed out: one version everywhere, and a wheel that works where only its dependencies are (`make wheel`)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import keepkv

ROOT = Path(__file__).parents[1]
WHEEL = os.environ.get("KEEPKV_WHEEL", "")
needs_wheel = pytest.mark.skipif(not WHEEL, reason="make wheel builds one")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment: the wheel, the packages of .venv-min, and not this checkout.

    .venv-min has what the wheel depends on, and pytest. Its path file to this checkout is not followed from here.
    """
    folder = tmp_path_factory.mktemp("environment")
    base = ROOT / ".venv-min"
    subprocess.run([base / "bin" / "python", "-m", "venv", "--without-pip", folder], check=True)
    (own,), (others,) = (list(place.glob("lib/python*/site-packages")) for place in (folder, base))
    (own / "dependencies.pth").write_text(str(others))
    made = folder / "bin" / "python"
    options = ("--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--ignore-installed")
    subprocess.run([sys.executable, "-m", "pip", "--python", made, "install", *options, WHEEL], check=True)
    return made


def run(python: Path, *args: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs it as somebody who has no checkout."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run([python, *args], cwd=python.parent, env=environment, capture_output=True, text=True, check=False)


def test_the_version_has_one_source() -> None:
    assert version("keepkv") == keepkv.__version__
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f"\nversion: {keepkv.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    released = re.findall(r"^## \[?(\d[\w.]*)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert released[0] == keepkv.__version__


@needs_wheel
def test_the_wheel_is_what_is_imported(python: Path) -> None:
    done = run(python, "-c", "import keepkv, pathlib; print(keepkv.__version__, pathlib.Path(keepkv.__file__).parent)")
    number, place = done.stdout.split()
    assert number == keepkv.__version__
    assert Path(place).is_relative_to(python.parents[1])
    assert (Path(place) / "py.typed").exists()


@needs_wheel
def test_the_commands_are_there(python: Path) -> None:
    said = run(python.with_name("keepkv"), "--version")
    assert said.returncode == 0, said.stderr
    assert keepkv.__version__ in said.stdout
    assert run(python, "-m", "keepkv", "--help").returncode == 0


@needs_wheel
def test_the_python_of_the_readme_runs(python: Path, folder: str, tmp_path: Path) -> None:
    [block] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "report.txt").write_text("The quick brown fox jumps over the lazy dog. " * 12)
    start = f"import os\nos.chdir({str(tmp_path)!r})\n"
    done = run(python, "-c", start + block.replace("your/model", folder).replace("max_new_tokens=100", "max_new_tokens=2"))
    assert done.returncode == 0, done.stderr
    assert "slots" in done.stdout


CONSUMER = "from keepkv import KeepCache\n\n\ndef held(cache: KeepCache) -> {}:\n    return cache.report().kv_bytes\n"


@needs_wheel
@pytest.mark.parametrize("returned", ["int", "str"])
def test_a_consumers_type_checker_sees_the_types(python: Path, tmp_path: Path, returned: str) -> None:
    (tmp_path / "consumer.py").write_text(CONSUMER.format(returned), encoding="utf-8")
    mypy = ["-m", "mypy", "--strict", "--python-executable", str(python), "--cache-dir", str(ROOT / ".mypy_cache/consumer")]
    done = run(Path(sys.executable), *mypy, tmp_path / "consumer.py")
    assert done.returncode == (returned == "str"), done.stdout + done.stderr
    assert ("Incompatible return value" in done.stdout) == (returned == "str")
