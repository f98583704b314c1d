#!/usr/bin/env bash
# Installs t5like with locked requirements into a virtual environment. Used by the Dockerfile, and by the tests.
#
#   launch/container/install.sh requirements TARGET VENV    a new environment; TARGET: cpu, cuda or tpu
#   launch/container/install.sh package VENV                t5like itself, from this folder
#
# Python 3.11 on Linux x86_64. Every file is compared with its sha256 in build.txt or TARGET.txt, which `make lock` writes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
venv=${!#}
pip() { "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }

case "$#-${1:-}" in
3-requirements)
    requirements=launch/container/$2.txt
    [ -f "$requirements" ] || { echo "$2 is no image; use cpu, cuda or tpu" >&2 && exit 2; }
    python3.11 -m venv "$venv"
    pip install --require-hashes --requirement launch/container/build.txt
    pip install --require-hashes --no-build-isolation --requirement "$requirements"
    ;;
2-package)
    pip install --no-deps --no-build-isolation --no-index .
    pip check
    cd /  # so that the installed package is used, not this folder
    "$venv/bin/t5like" --version
    "$venv/bin/t5like" configs >/dev/null
    ;;
*)
    sed -n 's/^#   //p' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
