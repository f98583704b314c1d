"""Write the locked requirements of the container images: cpu.txt, cuda.txt, tpu.txt and build.txt beside this file.

    make lock

Resolves setup.py with its extras under constraints.txt, by ``pip install --dry-run --report``, for the interpreter that
runs this script; it must be the one of the images: Python 3.11 on Linux, x86_64. Each line has the sha256 of one file.
"""

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
TARGETS = {
    "build": ("setuptools>=80,<83", "wheel>=0.45,<1"),  # build packages that have no wheel, and t5like itself
    "cpu": (".",),
    "cuda": (".[cuda]",),
    "tpu": (".[tpu]",),
}


def main() -> None:
    """Write all files."""
    if (sys.version_info[:2], platform.system(), platform.machine()) != ((3, 11), "Linux", "x86_64"):
        sys.exit(f"make lock needs Python 3.11 on Linux x86_64, that of the images; this is {platform.platform()}")
    for target, requirements in TARGETS.items():
        lines = [f"# Locked requirements of the image `{target}`; written by make lock.", *locked(requirements)]
        (FOLDER / f"{target}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{target}.txt: {len(lines) - 1} packages")


def locked(requirements: tuple[str, ...]) -> list[str]:
    """Return a line with version and sha256 for each package that the requirements need."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
            + ["--disable-pip-version-check", "--constraint=constraints.txt", f"--report={report.name}", *requirements],
            cwd=ROOT,
            check=True,
        )
        items = json.load(report)["install"]
    packages = [item for item in items if "dir_info" not in item["download_info"]]  # without t5like itself
    return sorted(
        f"{item['metadata']['name'].lower()}=={item['metadata']['version']} "
        f"--hash=sha256:{item['download_info']['archive_info']['hashes']['sha256']}"
        for item in packages
    )


if __name__ == "__main__":
    main()
