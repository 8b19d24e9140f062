#!/bin/sh
# Writes the locked requirements of the images: versions with the hashes of every file that may be installed.
set -eu
cd "$(dirname "$0")/../.."
lock() {
    target=$1
    shift
    "$UV" pip compile --quiet --upgrade --generate-hashes --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
        --no-emit-package twostroke-client --no-header --output-file "deploy/requirements/$target.lock" "$@" > /dev/null
}
lock cpu pyproject.toml --extra tracing deploy/requirements/cpu.in
lock cuda pyproject.toml --extra cuda --extra tracing deploy/requirements/cuda.in
lock model --no-deps deploy/requirements/model.in
lock nixl --no-deps deploy/requirements/nixl.in
