#!/usr/bin/env bash
# The dipole stage: localfield.nii.gz, mask.nii.gz and params.json in, chimap.nii.gz [ppm] out.
# For a network of your own, put its ONNX file beside this one and name it before --qsm-ci.
set -euo pipefail
exec qsm-run --qsm-ci --qsm-ci-folders "${1:-/input}" "${2:-/output}"
