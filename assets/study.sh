#!/usr/bin/env bash
# The ablations in miniature: `bash assets/study.sh [FOLDER]`, then `python assets/study.py [FOLDER]` for the tables.
# Plain calls of prime.py, two at a time on 2 cores, about a minute each. One SFT checkpoint a seed is shared by all arms.
# Finished runs are skipped, and those that ended with an error's line; cut-off ones begin anew: start it again to go on.
# SEEDS="0 1 2" takes other seeds.
set -u
cd "$(dirname "$0")/.."
export runs=${1:-runs/study} OMP_NUM_THREADS=1
seeds=${SEEDS:-0 1 2 3 4}
mkdir -p "$runs"

run() {  # SCRIPT NAME SEED OPTIONS...: a run, unless it is finished
    local folder=$runs/$2-$3
    [ -e "$folder/policy" ] || [ -e "$folder.ended" ] && return
    rm -rf "$folder"
    python "$1" --seed "$3" --output "$folder" "${@:4}" >"$folder.log" 2>&1 && return
    [ $? = 2 ] && touch "$folder.ended"  # no prompts within the filter, for instance: it would end so again
    echo "failed: $folder"
}
one() { run prime.py "$1" "$2" --model "$runs/sft-$2/sft" "${@:3}"; }
sft() { [ -e "$runs/sft-$1/sft" ] || { rm -rf "$runs/sft-$1"; python prime.py --steps 0 --seed "$1" --output "$runs/sft-$1" >"$runs/sft-$1.log" 2>&1; }; }
export -f run one sft

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
    arm four-updates-outcome --minibatch 32 --reward outcome
    arm double --prm-update double
    arm no-last-token --no-last-token
    arm drop-truncated --drop-truncated
    arm coefficients-5 --process-weight 5 --outcome-weight 5
    arm no-filter --no-filter
} | two_at_a_time

# Part 2. Each estimator's learning rate, from one grid, on two seeds that are not reported and on miniature-val; process
# rewards as the official code divides them and, where that matters (GRPO divides them itself), as the paper's text has them.
# The best mean wins; a run that ended early counts as 0.
grid() { seeds="5 6" arm "grid-$1-$2-$3" --estimator "$1" --lr "$3" --eval-data miniature-val --prm-probe-every 0 "${@:4}"; }
for lr in 5e-5 1e-4 2e-4 4e-4 8e-4; do
    for estimator in rloo grpo reinforce ppo; do
        grid $estimator outcome $lr --reward outcome
        grid $estimator prime $lr
    done
    for estimator in rloo reinforce ppo; do grid $estimator prime-no-normalize $lr --no-normalize; done
    grid rloo prime-gamma-0 $lr --gamma 0
    for weight in 0.1 0.3; do grid rloo prime-weight-$weight $lr --process-weight $weight; done
done | two_at_a_time
for lr in 2.5e-5 1.25e-5; do grid grpo prime $lr; done | two_at_a_time  # the one row whose best was at the edge

# Part 3. Longer chains and worse teachers: how much sooner an oracle reaches what outcomes alone reach, and what PRIME makes of it.
chains() {  # TAG SEED LENGTH WRONG BELIEF SLIP SFT-BATCH: data and an SFT model, then the runs
    local folder=$runs/chains-$1-$2 seed=$2
    local options="--template none --dtype float32 --max-prompt-tokens 64 --max-response-tokens 160 --token-budget 16384 --prompt-suffix="
    [ -e "$folder/sft/sft" ] || {
        python assets/chains.py "$folder" "$3" "$seed" "$4" "$5" "$6" >/dev/null 2>&1
        rm -rf "$folder/sft"
        python prime.py --model "$folder/init" --sft-data "$folder/sft.jsonl" --sft-epochs 1 --sft-batch "$7" --sft-lr 3e-3 --steps 0 \
            $options --seed "$seed" --output "$folder/sft" >"$folder/sft.log" 2>&1
    }
    options+=" --model $folder/sft/sft --data $folder/train.jsonl --eval-data $folder/test.jsonl --rollout hf --rollout-batch 512
        --prompts-per-step 32 --minibatch 128 --prm-minibatch 128 --lr 2e-4 --prm-lr 2e-4 --steps 60 --save-every 0 --eval-every 0
        --eval-samples 4 --eval-temperature 1.0 --max-draws 60"
    run prime.py "chains-$1-outcome" "$seed" $options --reward outcome
    run assets/oracle.py "chains-$1-oracle-gamma-0" "$seed" $options --gamma 0
    [ "$seed" = 5 ] && run assets/oracle.py "chains-$1-oracle" 5 $options
    [ "$1" = 12 ] || return 0
    options+=" --prm-probe-every 5"
    run prime.py chains-12-prime-nn-prmlr5e-5 "$seed" $options --no-normalize --prm-lr 5e-5
    run prime.py chains-12-prime-nn-prmlr5e-5-gamma-0 "$seed" $options --no-normalize --prm-lr 5e-5 --gamma 0
    [ "$seed" = 0 ] && {  # a longer budget, where 60 steps teach nothing
        run prime.py chains-12-long-outcome 0 $options --steps 120 --reward outcome
        run assets/oracle.py chains-12-long-oracle-gamma-0 0 $options --steps 120 --gamma 0
    }
    [ "$seed" = 5 ] || return 0  # looks at one seed: other rates and normalisation, trained PRMs, K, larger batches
    run prime.py chains-12-prime-no-normalize 5 $options --no-normalize
    run prime.py chains-12-prime-prmlr5e-5 5 $options --prm-lr 5e-5
    run prime.py chains-12-prm-only 5 $options --prm-warmup-steps 80 --steps 80
    run prime.py chains-12-prime-from-prm-nn 5 $options --prm "$runs/chains-12-prm-only-5/prm" --prm-lr 5e-5 --no-normalize
    local k8="--prompts-per-step 16 --group-size 8"
    run prime.py chains-12-k8-outcome 5 $options $k8 --reward outcome
    run prime.py chains-12-k8-prime-gamma-0 5 $options $k8 --no-normalize --prm-lr 5e-5 --gamma 0
    run assets/oracle.py chains-12-k8-oracle-gamma-0 5 $options $k8 --gamma 0
    options+=" --prompts-per-step 128 --steps 30 --lr 1e-4"  # four updates a step
    run prime.py chains-12-p128-outcome 5 $options --reward outcome
    run prime.py chains-12-p128-prime 5 $options --no-normalize
    run assets/oracle.py chains-12-p128-oracle-gamma-0 5 $options --gamma 0
}
export -f chains
{
    for seed in 5 $seeds; do echo chains 12 "$seed" 12 .25 .6 .02 24; done
    echo chains 6 5 6 .5 .6 .02 48
} | two_at_a_time

# Part 4. The paper's claims, each arm at the rate that part 2 chose: 4e-4 for outcomes alone and for process rewards that are
# not normalised, 2e-4 for those that are (GRPO 2.5e-5).
prime_lr() { [ "$1" = grpo ] && echo 2.5e-5 || echo 2e-4; }
best() { arm "best-$1" --lr "$2" --prm-probe-every 5 "${@:3}"; }
{
    best outcome 4e-4 --reward outcome --prm-probe-every 0 --eval-every 5
    best prime 2e-4 --eval-every 5
    best prime-no-normalize 4e-4 --no-normalize --eval-every 5
    best outcome-no-filter 4e-4 --reward outcome --no-filter --prm-probe-every 0
    for estimator in reinforce grpo ppo; do
        best $estimator-outcome 4e-4 --estimator $estimator --reward outcome --prm-probe-every 0
        best $estimator-prime "$(prime_lr $estimator)" --estimator $estimator
    done
    for lr in 5e-5 1e-4; do best grpo-prime-$lr $lr --estimator grpo; done  # whose spread in the grid is large
    for estimator in rloo reinforce grpo ppo; do  # whitening is a baseline as well
        best $estimator-outcome-no-whiten 4e-4 --estimator $estimator --reward outcome --no-whiten --prm-probe-every 0
        best $estimator-prime-no-whiten "$(prime_lr $estimator)" --estimator $estimator --no-whiten
    done
    for estimator in reinforce ppo; do best $estimator-prime-no-normalize 4e-4 --estimator $estimator --no-normalize; done
    # which PRM scores; its role, loss, reference, granularity
    best score-first-4 2e-4 --prm-minibatch 32 --prm-update score-first
    best single-4 2e-4 --prm-minibatch 32
    best double 2e-4 --prm-update double
    best value 2e-4 --prm-role value
    best dpo 2e-4 --prm-loss dpo
    best ref-policy 2e-4 --prm-ref policy
    best whole 2e-4 --granularity whole
    best process-only 2e-4 --reward process
    # an offline PRM: trained while the policy is held, then frozen, or kept online
    best prm-only 2e-4 --prm-warmup-steps 20 --steps 20
} | two_at_a_time
for seed in $seeds; do
    echo "one best-offline $seed --lr 2e-4 --prm $runs/best-prm-only-$seed/prm --prm-update none --prm-probe-every 5"
    echo "one best-online-from-offline $seed --lr 2e-4 --prm $runs/best-prm-only-$seed/prm --prm-probe-every 5"
    for gamma in 1 0; do
        echo "run assets/oracle.py best-oracle$([ $gamma = 0 ] && echo -gamma-0) $seed --model $runs/sft-$seed/sft --lr 4e-4 --gamma $gamma"
    done
done | two_at_a_time
