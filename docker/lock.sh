#!/usr/bin/env bash
# Writes requirements.txt and requirements-cpu.txt from pyproject.toml: every package of the images with its version. Needs uv.
# PACKAGE=VERSION pairs that should stay can be handed over as a constraints file: docker/lock.sh -c FILE
set -euo pipefail
cd "$(dirname "$0")"
lock() {
  local out=$1
  shift
  # Python 3.11 of the CPU image and 3.12 of the GPU image resolve to the same versions.
  uv pip compile ../pyproject.toml --extra app --extra demo --python-version 3.11 --python-platform x86_64-manylinux_2_34 \
    --no-header --no-annotate --quiet "$@" | sed '1i # Written by docker/lock.sh.' >"$out"
}
lock requirements.txt "$@"
lock requirements-cpu.txt --excludes cpu-excludes.txt "$@"
