#!/usr/bin/env bash
# Submits everything, each part after the one before:
# parts of the shards -> shards -> stage 1 -> features -> stage 2 -> scores.
#
#   slurm/chain.sh RECIPE FOLDER CORPUS ARGUMENTS…
#   slurm/chain.sh phoenix14t /path/to/folder phoenix14t /path/to/PHOENIX-2014-T-release-v3
#
# writes FOLDER/{shards,stage1,features,stage2}. CORPUS and what follows go to tools/make_shards.py.
# FEATURES="--copies=4" gives options to `flallm features`. SBATCH_OPTIONS="--partition=x" gives
# options of sbatch to every part, TRAINING_OPTIONS and SHARDS_OPTIONS to those parts only.
# Settings of the stages belong in the recipe.
set -euo pipefail

recipe=$1 folder=$2
shift 2
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

submit() { # NAME AFTER OPTIONS ARGUMENTS…
    local name=$1 after=$2 options=$3 job
    shift 3
    # shellcheck disable=SC2086 # options are several words
    job=$(sbatch --parsable --kill-on-invalid-dep=yes ${after:+--dependency=afterok:$after} --output="$folder/$name-%j.log" ${SBATCH_OPTIONS:-} $options "$here/$name.sh" "$@")
    echo "$name: job $job" >&2
    echo "$job"
}

shards=$(submit shards "" "${SHARDS_OPTIONS:-}" "$@" --out="$folder/shards")
joined=$(submit shards "$shards" "${SHARDS_OPTIONS:-} --array=0" "$@" --out="$folder/shards")
stage1=$(submit stage1 "$joined" "${TRAINING_OPTIONS:-}" "$recipe" --data.shards="$folder/shards" --run_dir="$folder/stage1")
# shellcheck disable=SC2086 # options are several words
features=$(submit features "$stage1" "${TRAINING_OPTIONS:-}" "$folder/stage1" --out="$folder/features" ${FEATURES:-})
stage2=$(submit stage2 "$features" "${TRAINING_OPTIONS:-}" "$recipe" --data.shards="$folder/features" --run_dir="$folder/stage2" --stage1="$folder/stage1")
submit evaluate "$stage2" "${TRAINING_OPTIONS:-}" "$folder/stage2" > /dev/null
