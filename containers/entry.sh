#!/usr/bin/env bash
# The image's entry point: if training does not work, it reports the reason in one line instead of starting.
# NEMO_RAO_NO_CHECK=1 starts without the check, which takes half a minute.
set -euo pipefail

# NVIDIA's own entry point runs first: it sets up CUDA for the driver, then executes its arguments.
nvidia=${NVIDIA_ENTRYPOINT:-/opt/nvidia/nvidia_entrypoint.sh}
if [[ -z "${NEMO_RAO_ENTERED:-}" && -x "$nvidia" ]]; then
  NEMO_RAO_ENTERED=1 exec "$nvidia" "${BASH_SOURCE[0]}" "$@"
fi
unset NEMO_RAO_ENTERED

if [[ -z "${NEMO_RAO_NO_CHECK:-}" ]] && ! nemo-rao doctor > /dev/null; then
  echo "not started; run nemo-rao doctor for details; NEMO_RAO_NO_CHECK=1 starts anyway" >&2
  exit 1
fi
if (($# == 0)); then
  set -- bash
fi
exec "$@"
