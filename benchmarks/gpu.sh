#!/usr/bin/env bash
# The benchmarks of a GPU, on a bare machine, in parts of less than 9 minutes:
#
#     benchmarks/gpu.sh 1|2|3 [options of throughput.py]
#
# 1: networks for 28 pixels, train, bfloat16 and float32; a step shared by the GPUs there are; and,
#    where FASHION_MNIST names the folder of its IDX files, time to accuracy. That runs the main job,
#    which needs wheels of all that pyproject.toml names and the machine lacks.
# 2: networks for 224 and 256 pixels, train, bfloat16.
# 3: all of them, infer, bfloat16; then some of the large ones, train, float32.
#
# Each writes gpu_PART.json, .md and .png to $OUT, or to benchmarks/results, and the first those of
# gpu_scaling and gpu_accuracy, too. Needed are JAX for the GPU, flax, optax, NumPy and clu (wheels
# in .wheels are used; `pip download --no-deps -d .wheels clu` gets that one, and clu needs absl-py
# and wrapt); PyTorch for its side, matplotlib for the plot. Options come last and win (of them
# scaling.py takes none but that it runs on CPU); to try a part without a GPU,
#
#     benchmarks/gpu.sh 2 --device=cpu --size=64 --batch=2 --rounds=1 --without_torch_compile
set -euo pipefail
part=${1:?which part: 1, 2 or 3}
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
large=resnet50,vgg13,googlenet,expanding_cnn,resnet18,vgg16,vgg16_residual_cam,baseline_cnn
largest=resnet50,vgg13,googlenet
results=${OUT:-benchmarks/results}

throughput() {
    python3 benchmarks/throughput.py --preset=gpu --json="$results/gpu_$1.json" "${@:2}"
}

scaling() {
    local task=(--device=cuda --model=resnet18 --size=224 --channels=3 --batch=256 --batch_each=256)
    case " $* " in *" --device=cpu "*) task=(--model=lenet --devices=2 --rounds=1) ;; esac
    timeout 90 python3 benchmarks/scaling.py "${task[@]}" --json="$results/gpu_scaling.json"
}

time_to_accuracy() {
    python3 -c 'import flaxcls.train' || {
        echo "no time to accuracy: the main job lacks a package (see the head of this script)" >&2
        return 1
    }
    timeout 120 python3 benchmarks/time_to_accuracy.py --path="$FASHION_MNIST" --seeds=1 \
        --json="$results/gpu_accuracy.json"
}

case $part in
1)
    minutes=6.5
    [[ -z ${FASHION_MNIST:-} ]] || minutes=4.5
    failed=0  # what one of them finds does not keep the others from running
    throughput 1 --models=$small --modes=train --minutes=$minutes "${@}" || failed=$?
    scaling "${@}" || failed=$?
    [[ -z ${FASHION_MNIST:-} ]] || time_to_accuracy || failed=$?
    exit $failed
    ;;
2) throughput 2 --models=$large --modes=train --dtype=bfloat16 --minutes=7.5 "${@}" ;;
3)
    throughput 3_infer --models=$large,$small --modes=infer --dtype=bfloat16 --minutes=4.5 "${@}"
    throughput 3_float32 --models=$largest --modes=train --dtype=float32 --minutes=3 "${@}"
    ;;
*)
    echo "no part $part: 1, 2 or 3" >&2
    exit 2
    ;;
esac
