#!/bin/sh
#SBATCH --job-name=qsm --array=1-100
#SBATCH --cpus-per-task=1 --mem=5G --time=04:00:00
# sbatch array.sh --bids STUDY [--method tv-unet ...], where qsm-run is on the PATH. Each task makes a hundredth; submitted
# again, they make what is missing. What came of all: qsm-run --bids STUDY --status
exec qsm-run "$@" --shard "$SLURM_ARRAY_TASK_ID/100" \
    --threads "$SLURM_CPUS_PER_TASK" --memory-limit 4G
