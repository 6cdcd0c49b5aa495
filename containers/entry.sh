#!/usr/bin/env bash
# The image's entry point: where training does not work, the reason in one line instead of a start.
# NEMO_RAO_NO_CHECK=1 starts all the same, and saves the half minute that the check takes.
set -euo pipefail

if [[ -z "${NEMO_RAO_NO_CHECK:-}" ]] && ! nemo-rao doctor > /dev/null; then
  echo "not started; nemo-rao doctor tells more, NEMO_RAO_NO_CHECK=1 starts all the same" >&2
  exit 1
fi

# What the image was before: it sets up NVIDIA's environment, and starts the command.
nvidia=/opt/nvidia/nvidia_entrypoint.sh
if [[ -x "$nvidia" ]]; then
  exec "$nvidia" "$@"
fi
if (($# == 0)); then
  set -- bash
fi
exec "$@"
