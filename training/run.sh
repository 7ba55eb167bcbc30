#!/usr/bin/env bash
# One run from sentences to a checkpoint on the four GPUs of one host, in so many seconds: the stages of training/README.md, those side by side that may be.
#
#     training/run.sh WORK SECONDS
#
# WORK holds texts.jsonl, jobs-0.xz, jobs-1.xz, styles.npz, text/ (the tokenizer) and kokoro*.bin or .safetensors; logs, sets and results go there, the
# checkpoint to WORK/tiny. The codec goes on from training/begun. Speech that is there already (WORK/sets) is not spoken again. SPEECH: seconds of that, by
# default 100. TOY=1: a few steps of everything on a CPU, from the speech that is there.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}.:src" PYTHONUNBUFFERED=1
work=$1 end=$(($(date +%s) + $2)) first=src/quaver/voices/tiny/speech_tokenizer/model.safetensors begun=training/begun
toy=${TOY:+--toy} logs=$work/logs
mkdir -p "$logs"
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

left() { echo $((end - $(date +%s) - $1)); }
device() { [ -n "$toy" ] && echo cpu || echo "cuda:$1"; }
several() { [ -n "$toy" ] && echo python3 || echo python3 -m torch.distributed.run --nproc-per-node=2 --master-port "$1"; }

if [ -z "$toy" ] && [ ! -e "$work/sets/.spoken" ]; then
    spoken=()
    for gpu in 0 1 2 3; do
        python3 -m training.kokoro speak --jobs "$work/jobs-$((gpu % 2)).xz" --weights "$work"/kokoro* --styles "$work/styles.npz" \
            --out "$work/sets/$gpu" --share "$gpu/4" --seconds "${SPEECH:-100}" --device "cuda:$gpu" > "$logs/speech-$gpu.log" 2>&1 &
        spoken+=($!)
    done
    for process in "${spoken[@]}"; do wait "$process"; done
    touch "$work/sets/.spoken"
fi
sets=()
for set in "$work"/sets/*; do sets+=(--set "$set"); done

# Both need about a minute before their clock starts, or some seconds after it stands still.
# shellcheck disable=SC2046
$(several 29601) -m training.decoder "${sets[@]}" --hours 30 --first $first --latents $begun --encoder $begun --resume $begun --drawn 0 \
    --out "$work/decoder" --seconds "$(left "${AROUND:-100}")" --device "$(device 2)" $toy > "$logs/decoder.log" 2>&1 &
decoder=$!
python3 -m training.encode "${sets[@]}" --first $first --latents $begun --out "$work/encoded" --device "$(device 0)" > "$logs/encode.log" 2>&1
# shellcheck disable=SC2046
$(several 29602) -m training.talker --set "$work/encoded" --texts "$work/texts.jsonl" --codec $begun/codec --tokenizer "$work/text" \
    --out "$work/talker" --seconds "$(left "${AROUND:-75}")" --device "$(device 0)" $([ -n "$toy" ] || echo --bf16) $toy > "$logs/talker.log" 2>&1
wait $decoder
[ -n "$toy" ] || python3 -m training.export --codec "$work/decoder/codec" --talker "$work/talker/talker" --tokenizer "$work/text" --out "$work/tiny"
