#!/usr/bin/env bash
# The image's entry point: where training does not work, the reason in one line instead of a start.
# NEMO_RAO_NO_CHECK=1 starts all the same, and saves the half minute that the check takes.
set -euo pipefail

# NVIDIA's own entry point comes first: it sets up CUDA for the driver, then starts what it is given.
nvidia=${NVIDIA_ENTRYPOINT:-/opt/nvidia/nvidia_entrypoint.sh}
if [[ -z "${NEMO_RAO_ENTERED:-}" && -x "$nvidia" ]]; then
  NEMO_RAO_ENTERED=1 exec "$nvidia" "${BASH_SOURCE[0]}" "$@"
fi
unset NEMO_RAO_ENTERED

if [[ -z "${NEMO_RAO_NO_CHECK:-}" ]] && ! nemo-rao doctor > /dev/null; then
  echo "not started; nemo-rao doctor tells more, NEMO_RAO_NO_CHECK=1 starts all the same" >&2
  exit 1
fi
if (($# == 0)); then
  set -- bash
fi
exec "$@"
