"""The wheel and the source distribution hold what the tree holds."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# The files that a build reads. A copy keeps a stale build/ of the tree out of the wheel.
FILES = ["pyproject.toml", "README.md", "LICENSE"]
FOLDERS = ["src", "passes"]
TRASH = shutil.ignore_patterns("__pycache__", "*.egg-info")

BUILD_SDIST = """
import sys
from setuptools import build_meta
build_meta.build_sdist(sys.argv[1])
"""


def run(*args, **kwargs):
    done = subprocess.run(args, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_of_the_tree(where):
    where.mkdir()
    for name in FILES:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, where)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, where / name, ignore=TRASH)
    return where


def build_wheel(source, where):
    run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"),
        *("--no-build-isolation", "--wheel-dir", str(where), str(source)),
    )
    (wheel,) = where.glob("*.whl")
    return wheel


def modules_in_the_tree(root):
    src, passes = root / "src", root / "passes"
    ours = {path.relative_to(src).as_posix() for path in src.rglob("*.py")}
    return ours | {
        f"conjoin/passes/{path.relative_to(passes).as_posix()}" for path in passes.rglob("*.py")
    }


def modules_in(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if name.endswith(".py")}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return copy_of_the_tree(tmp_path_factory.mktemp("tree") / "conjoin")


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    return build_wheel(tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory):
    where = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-c", BUILD_SDIST, str(where), cwd=tree)
    (archive,) = where.glob("*.tar.gz")
    return archive


def test_the_wheel_holds_the_modules_of_the_tree(wheel):
    assert modules_in(wheel) == modules_in_the_tree(ROOT)


def test_a_subpackage_that_is_not_listed_is_noticed(tmp_path):
    tree = copy_of_the_tree(tmp_path / "tree")
    (tree / "src/conjoin/unlisted").mkdir()
    (tree / "src/conjoin/unlisted/__init__.py").touch()
    wheel = build_wheel(tree, tmp_path / "wheel")
    assert modules_in_the_tree(tree) - modules_in(wheel) == {"conjoin/unlisted/__init__.py"}


def test_the_wheel_has_the_marker_the_command_and_the_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = archive.read(next(n for n in names if n.endswith("entry_points.txt")))
    assert "conjoin/py.typed" in names
    assert "conjoin = conjoin.cli:main" in entry_points.decode().splitlines()
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_needs_torch_and_tabulate_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    assert [line for line in needed if "extra ==" not in line] == [
        "Requires-Dist: torch>=2.11",
        "Requires-Dist: tabulate",
    ]


def test_the_wheel_imports_from_a_clean_folder(wheel, tmp_path):
    target = tmp_path / "target"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "import conjoin, conjoin.nn, conjoin.passes\n"
        "print(conjoin.__file__, conjoin.passes.__file__, sep='\\n')"
    )
    # An editable install answers through a finder on sys.meta_path, which -S -E leaves out;
    # torch is then found by the path alone.
    paths = [path for path in sys.path if path.endswith("site-packages")]
    code = f"import sys; sys.path += {paths!r}\n" + code
    for line in run(sys.executable, "-S", "-E", "-c", code, cwd=tmp_path).split():
        assert Path(line).is_relative_to(target)


def test_the_source_distribution_builds_the_same_wheel(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    again = build_wheel(source, tmp_path / "wheel")
    assert modules_in(again) == modules_in(wheel)
    with zipfile.ZipFile(again) as archive:
        assert "conjoin/py.typed" in archive.namelist()
