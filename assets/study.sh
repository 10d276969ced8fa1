#!/usr/bin/env bash
# The ablations in miniature: `bash assets/study.sh [FOLDER]`, then `python assets/study.py [FOLDER]` for the tables.
# Plain calls of prime.py, two at a time on 2 cores, about a minute each. One SFT checkpoint a seed is shared by all arms.
# Finished runs are skipped, cut-off ones begin anew: start it again to go on. SEEDS="0 1 2" takes other seeds.
set -u
cd "$(dirname "$0")/.."
export runs=${1:-runs/study} OMP_NUM_THREADS=1
seeds=${SEEDS:-0 1 2 3 4}
mkdir -p "$runs"

run() {  # SCRIPT NAME SEED OPTIONS...: a run, unless it is finished
    local folder=$runs/$2-$3
    [ -e "$folder/policy" ] && return
    rm -rf "$folder"
    python "$1" --seed "$3" --output "$folder" "${@:4}" >"$folder.log" 2>&1 || echo "failed: $folder"
}
one() { run prime.py "$1" "$2" --model "$runs/sft-$2/sft" "${@:3}"; }
oracle() { run assets/oracle.py "$1" "$2" --model "$runs/sft-$2/sft" --prm-probe-every 0 "${@:3}"; }
sft() { [ -e "$runs/sft-$1/sft" ] || { rm -rf "$runs/sft-$1"; python prime.py --steps 0 --seed "$1" --output "$runs/sft-$1" >"$runs/sft-$1.log" 2>&1; }; }
export -f run one oracle sft

arm() { for seed in $seeds; do echo "one $1 $seed ${*:2}"; done; }
two_at_a_time() { xargs -d '\n' -P 2 -I LINE bash -c LINE; }

for seed in $seeds 5 6; do echo "sft $seed"; done | two_at_a_time

# Part 1. What the official code does and the paper does not say, and the other way round, at the default learning rate.
{
    arm prime
    arm outcome --reward outcome
    arm half-lr --lr 5e-5
    arm double-lr --lr 2e-4
    arm official-baseline --process-baseline official
    arm no-normalize --no-normalize
    arm no-whiten --no-whiten
    arm sequence-mean --loss-average sequence
    arm prm-clip-1 --prm-grad-clip 1
    arm four-updates --minibatch 32 --prm-minibatch 32
    arm double --prm-update double
    arm no-last-token --no-last-token
    arm drop-truncated --drop-truncated
    arm coefficients-5 --process-weight 5 --outcome-weight 5
    arm no-filter --no-filter
} | two_at_a_time

# Part 2. Each estimator's learning rate, from one grid, on two seeds that are not reported and on miniature-val.
for lr in 2e-4 4e-4 1e-4; do
    for estimator in rloo grpo reinforce ppo; do
        for reward in outcome prime; do
            seeds="5 6"; arm grid-$estimator-$reward-$lr --estimator $estimator --reward $reward --lr $lr \
                --eval-data miniature-val --prm-probe-every 0
        done
    done
done | two_at_a_time
