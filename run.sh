#!/usr/bin/env bash
# The five stages in README order.
#
#   bash run.sh                      on a laptop: a small world, small models, a CPU; in runs/demo/
#   bash run.sh paper                the paper's models and data; in runs/paper/
#   bash run.sh demo decode report   only these steps, of: data reward dpo decode report; decoding goes on
#                                    where it was stopped
set -euo pipefail
cd "$(dirname "$0")"

mode=${1:-demo}
[ $# -gt 0 ] && shift
steps=${*:-data reward dpo decode report}
root=$PWD

for step in $steps; do
    case $step in
    data | reward | dpo | decode | report) ;;
    *)
        echo "error: run.sh has no step '$step'; it has data reward dpo decode report" >&2
        exit 2
        ;;
    esac
done

case $mode in
demo)
    # Two layers of 128 dimensions, posts of 50 to 90 tokens, 300 comparisons for the prefixes, 100 prompts.
    policy=$root/demo/models/summariser
    full_reward_model=$root/demo/models/full-reward-model
    ppo_policy=$root/demo/models/rl-summariser
    prefix_data=(--num_comparisons 300 --num_validation_comparisons 128)
    reward=(--per_device_train_batch_size 32 --gradient_accumulation_steps 1 --learning_rate 3e-5
        --gradient_checkpointing False --eval_steps 100000 --eval_entries 512 --save_strategy no
        --report_to none)
    dpo=(--per_device_train_batch_size 8 --gradient_accumulation_steps 1 --learning_rate 1e-3 --max_steps 100
        --gradient_checkpointing False --max_length 160 --save_strategy no --report_to none)
    decode=(--num_prompts 100 --max_new_tokens 32 --trace)
    ;;
paper)
    policy=vistagi/gpt2-large-tldr-sum
    full_reward_model=OpenAssistant/reward-model-deberta-v3-large
    ppo_policy=vistagi/gpt2-large-tldr-sum-rlhf
    prefix_data=() reward=() dpo=() decode=()
    ;;
*)
    echo "error: run.sh knows demo and paper, not '$mode'" >&2
    exit 2
    ;;
esac

. ./environment.sh
prepare_environment requirements.txt
mkdir -p "runs/$mode"
cd "runs/$mode"

stage() {
    printf '\n\033[1m+ %s\033[0m\n' "$*"
    "$@"
}

# Results of models that are trained anew here are old ones; `decode` alone goes on where it was stopped.
overwrite=()
for step in $steps; do
    case $step in
    data | reward | dpo) overwrite=(--overwrite) ;;
    esac
    case $step in
    data)
        [ "$mode" != demo ] || stage python "$root/demo/make_posts.py" .
        stage python "$root/DataProcess/tldr_data_process.py"
        stage python "$root/DataProcess/tldr_data_process_partial.py" --reward_model "$full_reward_model" \
            "${prefix_data[@]}"
        ;;
    reward)
        stage python "$root/partial_reward_training/tldr_partial_reward_model.py" \
            --model_name_or_path "$full_reward_model" "${reward[@]}"
        ;;
    dpo)
        stage python "$root/DPO_training/GPT2_large_DPO_tldr.py" --model_name_or_path "$policy" "${dpo[@]}"
        ;;
    decode)
        stage python "$root/PARGS_decode/PARGS_baselines.py" --policy "$policy" \
            --full_reward_model "$full_reward_model" --ppo_policy "$ppo_policy" "${decode[@]}" "${overwrite[@]}"
        ;;
    report)
        stage python "$root/Evaluation/show_result.py" --policy "$policy"
        [ "$mode" != demo ] || stage python "$root/demo/true_quality.py"
        stage python "$root/Evaluation/prefix_accuracy.py" --full_reward_model "$full_reward_model"
        stage python "$root/Evaluation/show_generations.py"
        if [ -n "${OPENAI_API_KEY:-}" ]; then
            stage python "$root/Evaluation/GPT4_eval_tldr.py" ./generation_pargs.json ./generation_args.json
        else
            echo "GPT-4 evaluation skipped: it needs OPENAI_API_KEY in the environment."
        fi
        ;;
    esac
done

if [ -e average_reward.png ]; then
    printf '\ntable   %s\nfigure  %s\npage    %s\n' "$PWD/average_reward.md" "$PWD/average_reward.png" \
        "$PWD/generations.html"
fi
