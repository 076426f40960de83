#!/usr/bin/env bash
# Submit a training run to a Ray cluster as a job, from the checkout. Ray leaves out what
# .gitignore lists (.venv, runs). RAY_ADDRESS is the cluster's dashboard, http://head:8265.
#
#   RAY_ADDRESS=http://head:8265 examples/ray_job.sh configs/rl/diffucoder_7b.yaml \
#       run.folder=/mnt/nfs/run1 train.steps=200
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
config=${1:?"usage: examples/ray_job.sh CONFIG [a.b=c ...]"}
shift
exec ray job submit --working-dir . -- python -m rl.train --config "$config" "$@"
