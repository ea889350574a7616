#!/usr/bin/env bash
# The five stages in README order.
#
#   bash run.sh                      a small world, small models, on the CPU of a laptop; in runs/demo/, and the
#                                    same stages with causal reward models in runs/demo/causal*/
#   bash run.sh paper                the paper's models and data; in runs/paper/
#   bash run.sh demo decode report   only these steps, of: data reward dpo decode report; decoding goes on
#                                    where it was stopped, and decodes anew what other models or settings change
#   bash run.sh demo decode -- --seed 3 --overwrite
#                                    flags for the script of one step, of: reward dpo decode; where the demo
#                                    starts it in several directories, every start gets them
#   bash run.sh --help               this
set -euo pipefail
cd "$(dirname "$0")"
root=$PWD

usage() { sed -n '/^#   bash/,/^set/s/^#   \{0,1\}//p' run.sh; }
refuse() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

mode=demo steps=() flags=()
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help)
        usage
        exit
        ;;
    --)
        shift
        flags=("$@")
        break
        ;;
    -*) refuse "flags of a step stand behind --: bash run.sh demo decode -- $*" ;;
    *) steps+=("$1") ;;
    esac
    shift
done
if [ ${#steps[@]} -gt 0 ]; then
    mode=${steps[0]}
    steps=("${steps[@]:1}")
fi
[ ${#steps[@]} -gt 0 ] || steps=(data reward dpo decode report)

for step in "${steps[@]}"; do
    case $step in
    data | reward | dpo | decode | report) ;;
    *) refuse "run.sh has no step '$step'; it has data reward dpo decode report: bash run.sh $mode decode report" ;;
    esac
done
if [ ${#flags[@]} -gt 0 ]; then
    case ${steps[*]} in
    reward | dpo | decode) ;;
    *) refuse "flags go to one step that is one script (reward, dpo or decode), not to '${steps[*]}': bash run.sh $mode decode -- ${flags[*]}" ;;
    esac
fi

case $mode in
demo)
    # Two layers of 128 dimensions, posts of 50 to 90 tokens; for the encoder four prefix lengths of each of 1,000
    # comparisons, and 50 prompts.
    # The causal half is cheaper: all 4,000 comparisons, all 200 prompts. The rewards of either half are those
    # of the other one's full reward model: no method is marked by its own guide.
    policy=$root/demo/models/summariser
    full_reward_model=$root/demo/models/full-reward-model
    causal_reward_model=$root/demo/models/causal-reward-model
    ppo_policy=$root/demo/models/rl-summariser
    training=(--gradient_accumulation_steps 1 --gradient_checkpointing False --save_strategy no
        --report_to none)
    prefix_data=(--num_comparisons 1000 --lengths_per_comparison 4 --num_validation_comparisons 128)
    reward=(--per_device_train_batch_size 32 --learning_rate 1e-4 --eval_steps 100000 --eval_entries 512
        "${training[@]}")
    dpo=(--per_device_train_batch_size 8 --learning_rate 1e-3 --max_steps 100 --max_length 160
        "${training[@]}")
    decode=(--num_prompts 50 --max_new_tokens 48 --evaluation_reward_model "$causal_reward_model" --trace)
    causal_prefix_data=(--num_comparisons 0 --num_validation_comparisons 128)
    causal_reward=(--per_device_train_batch_size 32 --learning_rate 3e-4 --eval_steps 100000 "${training[@]}")
    causal_decode=(--num_prompts 0 --max_new_tokens 48 --evaluation_reward_model "$full_reward_model")
    ;;
paper)
    policy=vistagi/gpt2-large-tldr-sum
    full_reward_model=OpenAssistant/reward-model-deberta-v3-large
    ppo_policy=vistagi/gpt2-large-tldr-sum-rlhf
    prefix_data=() reward=() dpo=() decode=()
    ;;
*) refuse "run.sh knows demo and paper, not '$mode': bash run.sh demo ${steps[*]}" ;;
esac

. ./environment.sh
prepare_environment requirements.txt
mkdir -p "runs/$mode"
cd "runs/$mode"

bold='' plain=''
[ ! -t 1 ] || bold=$'\033[1m' plain=$'\033[0m'

# The command as it can be pasted: with its directory, and quoted.
stage() {
    printf '\n%s(cd %q &&' "$bold" "$PWD"
    printf ' %q' "$(command -v "$1")" "${@:2}"
    printf ')%s\n' "$plain"
    "$@"
}

# stage_in DIRECTORY ...: the same in a directory below the run's.
stage_in() (
    mkdir -p "$1"
    cd "$1"
    shift
    stage "$@"
)

# A step of the causal half. causal-w3 weighs the reward more; causal-closed asks ARGS' guide with an EOS
# behind every prefix, where it was trained to be read.
causal() {
    local data=(--dataset ../summarize_from_feedback)
    local decode_in=(python "$root/PARGS_decode/PARGS_baselines.py" --policy "$policy" "${data[@]}"
        --full_reward_model "$causal_reward_model" "${causal_decode[@]}" "${overwrite[@]}")
    case $1 in
    data)
        stage_in causal python "$root/DataProcess/tldr_data_process_partial.py" "${data[@]}" \
            --reward_model "$causal_reward_model" "${causal_prefix_data[@]}"
        ;;
    reward)
        stage_in causal python "$root/partial_reward_training/tldr_partial_reward_model.py" \
            --model_name_or_path "$causal_reward_model" "${causal_reward[@]}" "${flags[@]}"
        ;;
    decode)
        stage_in causal "${decode_in[@]}" --methods ARGS PARGS-G PARGS BESTN TOP-K GREEDY "${flags[@]}"
        stage_in causal-w3 "${decode_in[@]}" --methods ARGS PARGS-G --args_weight 3 --pargs_g_weight 3 \
            --partial_reward_model ../causal/partial_reward_modeling_tldr "${flags[@]}"
        stage_in causal-closed "${decode_in[@]}" --methods ARGS --args_eos always "${flags[@]}"
        ;;
    report)
        stage_in causal python "$root/Evaluation/show_result.py" "${data[@]}" --policy "$policy"
        stage_in causal python "$root/Evaluation/prefix_accuracy.py" "${data[@]}" \
            --full_reward_model "$causal_reward_model"
        stage python "$root/demo/true_quality.py" . causal causal-w3 causal-closed
        ;;
    esac
}

# Results of models that are trained anew here are old ones; `decode` alone goes on where it was stopped.
overwrite=()
at=-1
stopped() {
    local flag kept=()
    for flag in "${flags[@]}"; do
        [ "$flag" = --overwrite ] || kept+=("$flag")  # or what is finished would go
    done
    [ ${#kept[@]} = 0 ] || kept=(-- "${kept[@]}")
    printf '\nstopped in the step %s; to go on from there: bash run.sh' "$step" >&2
    printf ' %q' "$mode" "${steps[@]:at}" "${kept[@]}" >&2
    printf '\n' >&2
    exit 130
}
trap stopped INT
for step in "${steps[@]}"; do
    at=$((at + 1))
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
            --model_name_or_path "$full_reward_model" "${reward[@]}" "${flags[@]}"
        ;;
    dpo)
        stage python "$root/DPO_training/GPT2_large_DPO_tldr.py" --model_name_or_path "$policy" "${dpo[@]}" \
            "${flags[@]}"
        ;;
    decode)
        stage python "$root/PARGS_decode/PARGS_baselines.py" --policy "$policy" \
            --full_reward_model "$full_reward_model" --ppo_policy "$ppo_policy" "${decode[@]}" \
            "${overwrite[@]}" "${flags[@]}"
        ;;
    report)
        stage python "$root/Evaluation/show_result.py" --policy "$policy"
        stage python "$root/Evaluation/prefix_accuracy.py" --full_reward_model "$full_reward_model"
        stage python "$root/Evaluation/show_generations.py"
        if [ -n "${OPENAI_API_KEY:-}" ]; then
            stage python "$root/Evaluation/GPT4_eval_tldr.py" ./generation_pargs.json ./generation_args.json
        else
            echo "GPT-4 evaluation skipped: it needs OPENAI_API_KEY in the environment."
        fi
        ;;
    esac
    [ "$mode" != demo ] || causal "$step"
done

# What came out, in words (of the demo, true_quality.py has just said it), and where.
if [ "$mode" = paper ] && [ -e results.json ]; then
    printf '\n'
    python -c 'import json; print(*json.load(open("results.json"))["in_words"], sep="\n")'
fi
printf '\n'
for file in true_quality.png {,causal/}average_reward.{md,png} {,causal/}results.json {,causal/}prefix_accuracy.png \
    generations.html; do
    [ ! -e "$file" ] || printf '%s\n' "$PWD/$file"
done
