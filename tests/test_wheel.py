"""The wheel builds, holds its data files, and works where only its dependencies are."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("opcd_lm-*.whl"))


def test_the_wheel_holds_the_package_and_its_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"opcd/py.typed", "opcd/cli.py", "opcd/report.html"} <= names
    assert {"opcd/anchors.json", "opcd/other_contexts.json"} <= names
    assert {f"opcd/authoring_prompts/{name}.md" for name in ("topics", "messages")} <= names
    assert {f"opcd/experience_prompts/{name}.md" for name in ("extract", "coach")} <= names
    assert not [name for name in names if name.startswith(("tests", "recipes"))]


def test_it_checks_a_run_from_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    """Dependencies come from the environment under test; opcd itself from the wheel alone."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    site = next((home / "lib").glob("python*/site-packages"))
    ours = Path(pytest.__file__).parent.parent
    # Only the libraries' folder: the editable install's own .pth files are not read from there.
    (site / "libraries.pth").write_text(f"{ours}\n", encoding="utf-8")
    run = ROOT / "recipes" / "support_desk" / "run.toml"
    # Nor from where whoever runs the tests finds modules.
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = "import opcd; print(opcd.__file__)"
    where = subprocess.run(
        [str(python), "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path, env=own
    )
    assert str(site) in where.stdout
    found = subprocess.run(
        [str(home / "bin" / "opcd"), "check", str(run)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=own,
        check=False,
    )
    assert (found.returncode, "can be started" in found.stdout) == (0, True), found.stderr
