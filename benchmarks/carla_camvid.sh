#!/usr/bin/env bash
# Real images: CARLA (a game engine) -> CamVid (photographs), MobileNetV2 from ImageNet weights, on a CPU.
# Source-only first; DIP starts from where it ended. The support images are drawn with a seed: in sorted order they would all be
# from the one sequence at dusk, and the validation images are from daylight.
#   benchmarks/carla_camvid.sh DATA [OUT]      DATA holds carla/, camvid/ and weights/; about a quarter of an hour on one core
set -euo pipefail
data=${1:?give the folder that holds carla/, camvid/ and weights/}
out=${2:-runs}
protonb=$(dirname "$0")/../.venv/bin/protonb
[ -x "$protonb" ] || protonb=protonb
common=(--net dip_mobilenetv2 --classes camvid --recipe released
        --crop-height 225 --crop-width 305 --lr 0.02 --checkpoint-every 100 --val "camvid:$data/camvid")
source="carla:$data/carla,size=300x400,cache=true"
"$protonb" train source-only --source "$source" --out "$out/carla" --steps 300 --batch-size 2 \
  --weights "$data/weights/mobilenetv2_imagenet_fp16.safetensors" "${common[@]}"
for shots in 1 5; do
  "$protonb" train dip --source "$source" --target "camvid:$data/camvid" --shots $shots --support-seed 0 \
    --out "$out/camvid-$shots-shot" --steps 300 --weights "$out/carla" "${common[@]}"
done
"$protonb" report "$out/carla" "$out/camvid-1-shot" "$out/camvid-5-shot" --data "camvid:$data/camvid" --images 5 --out "$out/camvid.html"
