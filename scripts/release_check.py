"""Whether what is about to be released works for somebody who has nothing of it: ``make release-check``.

1. Build the sdist, and the wheel from it; check what is in them.
2. Install the wheel alone into a new environment: the tools run, and each recipe copied out of it is planned.
3. Add ``[axolotl]``: Axolotl validates each recipe, and the demo trains, packs, verifies and asks.

torch and Axolotl have the versions of requirements/oldest.txt. Everything is made in a temporary folder.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECIPES = Path("examples/falcon-e")  # the demo's configs name their files from here
VERSION = re.findall(r'__version__ = "(.+)"', (ROOT / "src/axolotl_bitnet/__init__.py").read_text())[0]

VALIDATE = """
import sys, yaml
from axolotl.cli.config import prepare_plugins
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault

gpu = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 2, "compute_capability": "sm_90"}
for path in sys.argv[1:]:
    cfg = DictDefault(yaml.safe_load(open(path, encoding="utf-8")))
    prepare_plugins(cfg)
    known = validate_config(cfg, capabilities=gpu, env_capabilities={"torch_version": "2.13.0"})
    assert known.use_onebitllms is True and set(cfg) <= set(known), path
"""


def run(*command: str | Path, cwd: Path, quiet: bool = True) -> str:
    """Run a command without this checkout in its reach; return what it prints, or end with it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, text=True,
        stdout=subprocess.PIPE if quiet else None, stderr=subprocess.STDOUT if quiet else None,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{(done.stdout or '')[-3000:]}\n{' '.join(map(str, command))}: status {done.returncode}")
    return done.stdout or ""


def build(folder: Path) -> Path:
    """The wheel, once it and the sdist hold what they should."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    with tarfile.open(sdist) as archive:
        sources = {name.split("/", 1)[-1] for name in archive.getnames()}
    info = f"axolotl_bitnet-{VERSION}.dist-info"
    assert {name.split("/")[0] for name in names} == {"axolotl_bitnet", info}, "other folders in the wheel"
    for kind in ("falcon-e", "convert"):
        for path in run("git", "ls-files", ".", cwd=ROOT / "examples" / kind).split():
            assert f"axolotl_bitnet/recipes/{path}" in names, f"the wheel lacks the recipe {path}"
    assert {"axolotl_bitnet/report/page.html", f"{info}/licenses/LICENSE"} <= names
    assert {"tests/conftest.py", "docs/cli.md", "scripts/demo.py", "LICENSE", "Makefile"} <= sources
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{VERSION}] - " in changes, f"CHANGELOG.md has no entry for {VERSION}"
    for path, files in ((wheel, names), (sdist, sources)):
        print(f"{path.name}: {len(files)} entries, {path.stat().st_size / 1e3:.0f} kB", flush=True)
    return wheel


def install(python: Path, requirement: str, folder: Path) -> None:
    """Install with the pins of requirements/oldest.txt; say how long it took and what was downloaded."""
    lines = (ROOT / "requirements/oldest.txt").read_text().splitlines()
    (folder / "constraints.txt").write_text("\n".join(line for line in lines if re.match(r"[\w-]+==", line)))
    start = time.monotonic()
    pip = (python, "-m", "pip", "install", "--progress-bar", "off")
    said = run(*pip, "-c", folder / "constraints.txt", requirement, cwd=folder)
    units = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}
    sizes = re.findall(r"(?:Downloading|Using cached) \S+ \(([\d.]+) (bytes|[kMG]B)\)", said)
    local = [Path(path) for path in re.findall(r"Processing (/\S+\.whl)", said)]
    total = sum(float(number) * units[unit] for number, unit in sizes)
    total += sum(path.stat().st_size for path in local)
    count = len(said.rsplit("Successfully installed", 1)[-1].split())
    seconds = time.monotonic() - start
    print(f"  {count} packages, {total / 1e6:.0f} MB downloaded, {seconds:.0f} s", flush=True)


def main() -> None:
    os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="release-check-") as name:
        folder = Path(name)
        wheel = build(folder)
        print("the tools, alone", flush=True)
        venv.create(folder / "environment", with_pip=True)
        programs = folder / "environment" / "bin"
        os.environ["PATH"] = f"{programs}{os.pathsep}{os.environ['PATH']}"
        install(programs / "python", str(wheel), folder)
        tool = programs / "axolotl-bitnet"
        assert f"axolotl-bitnet {VERSION}" in " ".join(run(tool, "doctor", cwd=folder).split())
        run(tool, "recipes", RECIPES, cwd=folder)
        recipes = sorted((folder / RECIPES).rglob("*.yaml"))
        for recipe in recipes:
            assert "nothing in this config is refused" in run(tool, "plan", recipe, cwd=folder), recipe
        print(f"  {len(recipes)} recipes planned", flush=True)
        print("with [axolotl]", flush=True)
        install(programs / "python", f"{wheel}[axolotl]", folder)
        run(programs / "python", "-c", VALIDATE, *recipes, cwd=folder)
        print(f"  {len(recipes)} recipes validated by Axolotl", flush=True)
        run(programs / "python", ROOT / "scripts/demo.py", cwd=folder, quiet=False)
        outputs = folder / "outputs" / "tiny-dpo"
        run(tool, "export", outputs, "--to", "dense,mlx", cwd=folder)
        print(run(tool, "verify", outputs / "mlx", "--no-run", cwd=folder).splitlines()[0])
    print(f"{VERSION} can be released: {time.monotonic() - start:.0f} s in all")


if __name__ == "__main__":
    main()
