#!/usr/bin/env bash
# xpk: a workload on a GKE cluster with TPUs; this is also the way to TPU7x.
#   PROJECT=P ZONE=Z CLUSTER=C IMAGE=python:3.12 WORKDIR=gs://BUCKET/flux examples/xpk.sh [--dry-run]
# From a fresh clone: xpk packs the whole folder. The cluster, once:
#   xpk cluster create --cluster=C --project=P --zone=Z --tpu-type=v5litepod-16 --num-slices=1 --spot
set -euo pipefail
: "${PROJECT:?}" "${ZONE:?}" "${CLUSTER:?}" "${WORKDIR:?gs://BUCKET/..., or a folder that all workers share}"
cd "$(dirname "$0")/.."

# 75: stopped and saved; xpk itself restarts after 127 and above. Without `exec` a shell between would
# keep SIGTERM from the run.
exec xpk workload create \
  --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" \
  --workload="${NAME:-coda-flux}" --tpu-type="${TYPE:-v5litepod-16}" \
  --base-docker-image="${IMAGE:-python:3.12}" --script-dir=. \
  --max-restarts=100 --restart-on-exit-codes=75 --termination-grace-period-seconds=300 \
  --command="pip install '.[tpu,gcs]' && exec python -m coda_jax.train --distributed --config=configs/flux.py --workdir=$WORKDIR" \
  "$@"
