#!/bin/sh
# Makes the texts and the tiny head: sh plugins/eagle/tiny/make.sh FOLDER MINUTES (FOLDER/../tiny holds the corpus).
set -e
folder=$1
minutes=$2
write="python3 plugins/eagle/tiny/generate.py --data $(dirname "$folder")/tiny --out $folder"
for temperature in 0.0 0.7 1.0; do
    $write --split train --temperature $temperature --rows 8192 &
    $write --split held_out --temperature $temperature --rows 128 &
done
$write --split train --rows 2560 &
wait
cat "$folder"/train_*.jsonl > "$folder/texts.jsonl"
python3 -m specplug_eagle.train --target tiny --data "$folder/texts.jsonl" --held-out "$folder/held_out_0.0.jsonl" \
    --out "$folder/run" --layer-ids 4,8,12 --lm-head borrow --intermediate-size 768 --norm-output --steps 6 --gamma 5 \
    --batch-tokens 32768 --accumulate 1 --learning-rate 3e-3 --clip 1.0 --warmup 0.03 --epochs 30 --max-minutes "$minutes"
