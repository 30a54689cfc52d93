#!/usr/bin/env bash
# The benchmarks of a GPU, on a bare machine, in parts of less than 9 minutes:
#
#     benchmarks/gpu.sh 1|2|3|4|5 [options of throughput.py]
#
# 1: networks for 28 pixels, train, bfloat16; a step shared by the GPUs there are; and,
#    where FASHION_MNIST names the folder of its IDX files, time to accuracy. That runs the main job,
#    which needs wheels of all that pyproject.toml names and the machine lacks.
# 2: networks for 224 and 256 pixels, train, bfloat16.
# 3: vgg16 and vgg16_residual_cam, train, and all networks, infer, bfloat16; and what takes the time
#    of a step of resnet50.
# 4, 5: vgg16 and vgg16_residual_cam on Fashion-MNIST at 224 pixels from scratch, in bfloat16, with
#    batches of 128 and 16 times the published rate; FASHION_MNIST is needed, and the main job.
#
# Each writes gpu_PART.json, .md and .png to $OUT, or to benchmarks/results, and the first those of
# gpu_scaling and gpu_accuracy, too, without their plots where $OUT is set; 4 and 5 the summary of
# their run. Needed are JAX for the GPU, flax, optax, NumPy and clu (wheels
# in .wheels are used; `pip download --no-deps -d .wheels clu` gets that one, and clu needs absl-py
# and wrapt); PyTorch for its side, matplotlib for the plot. Options come last and win (of them
# scaling.py takes none but that it runs on CPU); to try a part without a GPU,
#
#     benchmarks/gpu.sh 2 --device=cpu --size=64 --batch=2 --rounds=1 --without_torch_compile
set -euo pipefail
part=${1:?which part: 1 to 5}
shift
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

if compgen -G '.wheels/*.whl' >/dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" .wheels/*.whl
    PYTHONPATH="$PYTHONPATH:$site"
fi
python3 -c 'import clu.metrics' || {
    echo "clu is missing: put its wheel into .wheels (see the head of this script)" >&2
    exit 1
}

small=like_vgg,fashion_net0,fashion_net1,fashion_net2,ts_cnn,ai_inno_cnn
large=resnet50,vgg13,googlenet,expanding_cnn,resnet18,baseline_cnn
larger=vgg16,vgg16_residual_cam
results=${OUT:-benchmarks/results}

throughput() {
    python3 benchmarks/throughput.py --preset=gpu --json="$results/gpu_$1.json" "${@:2}"
}

scaling() {
    local task=(--device=cuda --model=resnet18 --size=224 --channels=3 --batch=256 --batch_each=256)
    case " $* " in *" --device=cpu "*) task=(--model=lenet --devices=2 --rounds=1) ;; esac
    timeout 90 python3 benchmarks/scaling.py "${task[@]}" --json="$results/gpu_scaling.json"
}

need_main_job() {
    python3 -c 'import flaxcls.train' || {
        echo "the main job lacks a package (see the head of this script)" >&2
        return 1
    }
}

time_to_accuracy() {
    need_main_job || return
    timeout 120 python3 benchmarks/time_to_accuracy.py --path="$FASHION_MNIST" --seeds=1 \
        --json="$results/gpu_accuracy.json"
}

profile() {
    python3 benchmarks/profile_step.py "$@" --json="$results/gpu_profile.json"
}

fashion() {
    need_main_job
    local run
    run=$(mktemp -d)/run
    timeout 530 python3 -m flaxcls.main --config="fashion/$1" --workdir="$run" \
        --config.data.path="${FASHION_MNIST:?the folder of the IDX files}" \
        --config.model.pretrained= --config.precision=bfloat16 --config.train.batch_size=128 \
        --config.optimizer.learning_rate=0.016 --config.train.epochs=20 "${@:2}"
    cp "$run/summary.json" "$results/gpu_$1.json"
    cp "$run/metrics.jsonl" "$results/gpu_$1_metrics.jsonl"
}

case $part in
1)
    minutes=6.5
    [[ -z ${FASHION_MNIST:-} ]] || minutes=4.5
    failed=0  # what one of them finds does not keep the others from running
    throughput 1 --models=$small --modes=train --dtype=bfloat16 --minutes=$minutes "${@}" || failed=$?
    scaling "${@}" || failed=$?
    [[ -z ${FASHION_MNIST:-} ]] || time_to_accuracy || failed=$?
    # No more files come back from some machines than eight.
    [[ -z ${OUT:-} ]] || rm -f "$OUT"/gpu_{scaling,accuracy}.png
    exit $failed
    ;;
2) throughput 2 --models=$large --modes=train --dtype=bfloat16 --minutes=7.5 "${@}" ;;
3)
    throughput 3_train --models=$larger --modes=train --dtype=bfloat16 --minutes=2.5 "${@}"
    throughput 3_infer --models=$large,$larger,$small --modes=infer --dtype=bfloat16 \
        --minutes=4.5 "${@}"
    case " $* " in
    *" --device=cpu "*) profile lenet ;;
    *) profile resnet50 --preset=gpu --dtype=bfloat16 ;;
    esac
    ;;
4) fashion vgg16 "${@}" ;;
5) fashion vgg16_residual_cam "${@}" ;;
*)
    echo "no part $part: 1 to 5" >&2
    exit 2
    ;;
esac
