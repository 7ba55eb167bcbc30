#!/usr/bin/env bash
# One run from sentences to a checkpoint on the four GPUs of one host, in so many seconds: the stages of training/README.md, those side by side that may be.
#
#     training/run.sh WORK SECONDS
#
# WORK holds texts.jsonl, jobs-0.xz, jobs-1.xz, styles.npz, text/ (the tokenizer) and kokoro*.bin or .safetensors; logs, sets and results go there, the
# checkpoint to WORK/tiny. Codec and talker go on from the voice that ships, its codebooks are in training/begun. Speech that is there already (WORK/sets) is
# not spoken again; SPEECH: seconds of it, by default 130. VOICES: seconds of the speaker encoder, 75. ENCODER: seconds in which the codec's encoder goes on,
# beside the decoder, 0. ANEW=1: the talker from nothing. TOY=1: a few steps of everything on a CPU, from the speech that is there.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}.:src" PYTHONUNBUFFERED=1
work=$1 end=$(($(date +%s) + $2)) voice=src/quaver/voices/tiny begun=training/begun
first=$voice/speech_tokenizer/model.safetensors
toy=${TOY:+--toy} logs=$work/logs
mkdir -p "$logs"
# What the export at the very end asks: better told now.
python3 -c "from importlib import metadata; metadata.version('quaver')"
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

left() { echo $((end - $(date +%s) - $1)); }
device() { [ -n "$toy" ] && echo cpu || echo "cuda:$1"; }
several() { [ -n "$toy" ] && echo python3 || echo python3 -m torch.distributed.run --nproc-per-node=2 --master-port "$1"; }

sets=()
for gpu in 0 1 2 3; do sets+=(--set "$work/sets/$gpu"); done
[ -n "$toy" ] && sets=(--set "$work/sets/0")
if [ -z "$toy" ] && [ ! -e "$work/sets/.spoken" ]; then
    for gpu in 0 1 2 3; do
        python3 -m training.kokoro speak --jobs "$work/jobs-$((gpu % 2)).xz" --weights "$work"/kokoro* --styles "$work/styles.npz" \
            --out "$work/sets/$gpu" --share "$((gpu / 2))/2" --seconds "${SPEECH:-130}" --device "cuda:$gpu" > "$logs/speech-$gpu.log" 2>&1 &
    done
    wait
    touch "$work/sets/.spoken"
fi

# The decoder and the talker need about a minute before their clocks start, and some seconds after they stand still.
hours=$([ -n "$toy" ] && echo 0.01 || echo 30)
encoder=$first
if [ "${ENCODER:-0}" -gt 0 ]; then
    encoder=$work/encoder/codec
    python3 -m training.encoder train "${sets[@]}" --first $first --latents $begun --out "$work/encoder" --seconds "$ENCODER" --device "$(device 3)" $toy \
        > "$logs/encoder.log" 2>&1 &
fi
# shellcheck disable=SC2046
$(several 29601) -m training.decoder "${sets[@]}" --hours "$hours" --first $first --latents $begun --encoder "$encoder" --resume $first --drawn 0 \
    --voices "$work/voices" --own "$work/own" --out "$work/decoder" --seconds "$(left "${AROUND:-100}")" --device "$(device 2)" $toy > "$logs/decoder.log" 2>&1 &
decoder=$!
python3 -m training.encode "${sets[@]}" --first $first --latents $begun --out "$work/encoded" \
    --device "$(device 0)" $([ -n "$toy" ] || echo "$(device 1) $(device 2)") > "$logs/encode.log" 2>&1
# The speaker encoder has the time until the talker's first step.
python3 -m training.voices --set "$work/encoded" --latents $begun --out "$work/voices" --seconds "${VOICES:-75}" --device "$(device 1)" $toy \
    > "$logs/voices.log" 2>&1 &

# What the talker says itself, for the decoder: the voice that ships first, then twice the one that learns.
own() {
    python3 -m training.own "${sets[@]}" --hours "$hours" --encoded "$work/encoded" --texts "$work/texts.jsonl" --latents $begun --tokenizer "$work/text" \
        --talker "$1" --out "$work/own" --device "$(device 3)" ${2:-} >> "$logs/own.log" 2>&1 || echo "no codes of the talker's own: $logs/own.log" >&2
}
span=$(left 0)
{
    [ -n "$toy" ] || own $voice/model.safetensors
    for share in 45 75; do
        sleep $((span * share / 100 - (span - $(left 0))))
        own "$work/talker/talker" "$toy"
    done
} &
earlier=()
[ -n "${ANEW:-}$toy" ] || earlier=(--resume $voice/model.safetensors --lr 1.2e-3)
# shellcheck disable=SC2046
$(several 29602) -m training.talker --set "$work/encoded" --texts "$work/texts.jsonl" --latents $begun --tokenizer "$work/text" \
    --voices "$work/voices" "${earlier[@]}" --out "$work/talker" --seconds "$(left "${AROUND:-105}")" --device "$(device 0)" \
    $([ -n "$toy" ] || echo --bf16 --compile) $toy > "$logs/talker.log" 2>&1 || echo "the talker ended early: $logs/talker.log" >&2
wait $decoder
[ -n "$toy" ] || python3 -m training.export --codec "$work/decoder/codec" --talker "$work/talker/talker" --tokenizer "$work/text" --out "$work/tiny"
