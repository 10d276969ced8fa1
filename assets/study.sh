#!/usr/bin/env bash
# The ablations in miniature: `bash assets/study.sh [FOLDER]`, then `python assets/study.py [FOLDER]` for the tables.
# Plain calls of prime.py, two at a time on 2 cores, about a minute each. One SFT checkpoint a seed is shared by all arms.
# Finished runs are skipped, cut-off ones begin anew: start it again to go on. SEEDS="0 1 2" takes other seeds.
set -u
cd "$(dirname "$0")/.."
export runs=${1:-runs/study} OMP_NUM_THREADS=1
seeds=${SEEDS:-0 1 2 3 4}
mkdir -p "$runs"

one() {  # NAME SEED OPTIONS...: a run, unless it is finished
    local folder=$runs/$1-$2
    [ -e "$folder/policy" ] && return
    rm -rf "$folder"
    python prime.py --model "$runs/sft-$2/sft" --seed "$2" --output "$folder" "${@:3}" >"$folder.log" 2>&1 || echo "failed: $folder"
}
sft() { [ -e "$runs/sft-$1/sft" ] || { rm -rf "$runs/sft-$1"; python prime.py --steps 0 --seed "$1" --output "$runs/sft-$1" >"$runs/sft-$1.log" 2>&1; }; }
export -f one sft

arm() { for seed in $seeds; do echo "one $1 $seed ${*:2}"; done; }
two_at_a_time() { xargs -d '\n' -P 2 -I LINE bash -c LINE; }

for seed in $seeds; do echo "sft $seed"; done | two_at_a_time
{
    # the defaults, the baseline, learning rates around the default
    arm prime
    arm outcome --reward outcome
    arm half-lr --lr 5e-5
    arm double-lr --lr 2e-4
    # what the official code does and the paper does not say, and the other way round
    arm official-baseline --process-baseline official
    arm no-normalize --no-normalize
    arm no-whiten --no-whiten
    arm sequence-mean --loss-average sequence
    arm prm-clip-1 --prm-grad-clip 1
    arm four-updates --minibatch 32 --prm-minibatch 32
    arm no-last-token --no-last-token
    arm drop-truncated --drop-truncated
    arm coefficients-5 --process-weight 5 --outcome-weight 5
    arm no-filter --no-filter
    arm outcome-no-filter --reward outcome --no-filter
    # which PRM scores
    arm score-first-4 --prm-minibatch 32 --prm-update score-first
    arm single-4 --prm-minibatch 32
    arm double --prm-update double
    # the PRM: role, loss, reference, granularity
    arm value --prm-role value
    arm dpo --prm-loss dpo
    arm ref-policy --prm-ref policy
    arm whole --granularity whole
    arm process-only --reward process
    # estimators, with and without process rewards
    for estimator in reinforce grpo ppo; do
        arm $estimator --estimator $estimator
        arm $estimator-outcome --estimator $estimator --reward outcome
        arm $estimator-no-whiten --estimator $estimator --no-whiten
        arm $estimator-outcome-no-whiten --estimator $estimator --reward outcome --no-whiten
    done
    arm outcome-no-whiten --reward outcome --no-whiten
    # an offline PRM: trained while the policy is held, then frozen, or kept online
    arm prm-only --prm-warmup-steps 20 --steps 20
} | two_at_a_time
for seed in $seeds; do
    echo "one offline $seed --prm $runs/prm-only-$seed/prm --prm-update none"
    echo "one online-from-offline $seed --prm $runs/prm-only-$seed/prm"
done | two_at_a_time
