#!/usr/bin/env bash
# Everything that takes a machine with a GPU, in one go:
#
#     tests/benchmarks/gpu.sh                          # six minutes on an H100
#     tests/benchmarks/gpu.sh --device cpu --tiny      # the same at toy size, without a GPU
#
# The tests marked `gpu`; the start of one layer beside PEFT's; a 7B-shaped checkpoint from disk to
# disk; loading and training what came out. Progress goes to stderr, one table to stdout at the end.
set -euo pipefail
cd "$(dirname "$0")/../.."

cat >&2 <<'NEEDS'
needs:  pip install -e '.[test]', over a torch built for this GPU's CUDA; the triton that comes with it
        a C compiler (cc), which triton calls
        32 GB of disk below $TMPDIR (or /tmp) and 24 GB of memory; neither the network nor a model
NEEDS
python - >&2 <<'CHECK'
import importlib.util, shutil, sys
names = "torch triton bitsandbytes transformers peft accelerate numba safetensors pytest hypothesis"
missing = [name for name in names.split() if importlib.util.find_spec(name) is None]
missing += [] if shutil.which("cc") else ["cc"]
sys.exit(f"missing: {' '.join(missing)}" if missing else 0)
CHECK
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} python -m tests.benchmarks.gpu "$@" "$work"
