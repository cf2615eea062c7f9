#!/usr/bin/env bash
# Measures on one GPU, in less than eight minutes, without network: bash benchmarks/gpu.sh OUT [--tiny]
#
#   OUT/checks.txt      tests marked `cuda`, FlashAttention and flex attention among them (where pytest is there)
#   OUT/selections.md   every selection against the time that its bytes take, and the host's waits
#   OUT/waits.md        where the host waits in a whole prefill
#   OUT/NAME/           prefill and decoding of a published shape with random weights in bfloat16, as `vtc bench` records
#                       it; where its extra is installed, python benchmarks/gpu.py draw OUT/NAME draws tables and figures
#
# --tiny takes the same steps with small shapes on the CPU. Whatever fails, the steps behind it run; the status tells.
set -u
out= tiny=
for word in "$@"; do
  case $word in
    --tiny) tiny=--tiny ;;
    -*) echo "gpu.sh: no option $word; write: bash benchmarks/gpu.sh OUT [--tiny]" >&2; exit 2 ;;
    *) out=$word ;;
  esac
done
[ -n "$out" ] || { echo "gpu.sh: no folder for the results; write: bash benchmarks/gpu.sh OUT [--tiny]" >&2; exit 2; }
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
export HF_HUB_OFFLINE=1

cd "$root" || exit 2
if ! "$python" -c 'import vtc.eval, vtc.adapters' 2>/dev/null; then # not installed: the folders as the package has them
  mkdir -p "$out/.path/vtc" && ln -sfn "$root"/vtc/* "$root/adapters" "$root/eval" "$out/.path/vtc/"
  export PYTHONPATH="$out/.path${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 # not the folder vtc of this one
fi

status=0
step() { # name, seconds at most (of a small CPU many more), command
  local name=$1 most=$2 begun=$SECONDS
  shift 2
  [ -z "$tiny" ] || most=600 # whatever else the machine does
  if timeout "${tiny:+90}$most" "$@"; then echo "$name: done in $((SECONDS - begun)) s"; else
    echo "$name: failed with $? after $((SECONDS - begun)) s" >&2
    status=1
  fi
}

tests() {
  "$python" -c 'import pytest, hypothesis, pytest_timeout' 2>/dev/null || { echo "pytest, pytest-timeout or hypothesis is missing" >&2; return 1; }
  VTC_SYNC_DEBUG=error "$python" -m pytest -q -m cuda tests/test_kernels.py tests/test_host_traffic.py tests/test_triton.py -p no:cacheprovider >"$out/checks.txt" 2>&1
}
export -f tests
export python out

step "tests" 100 bash -c tests
step "selections" 70 "$python" benchmarks/gpu.py selections "$out/selections.md" $tiny
step "waits" 30 "$python" benchmarks/gpu.py waits "$out/waits.md" $tiny
shapes="llava-1.5-7b:120 qwen2.5-vl-7b:75 qwen3-vl-4b:85"
[ -z "$tiny" ] || shapes=llava-1.5-7b:
for each in $shapes; do
  shape=${each%:*}
  step "$shape" "${each#*:}" "$python" benchmarks/gpu.py bench "$out/$shape" "$shape" $tiny
  if "$python" -c 'import importlib.util as u; assert all(map(u.find_spec, ("jinja2", "vl_convert", "lmms_eval")))' 2>/dev/null; then "$python" benchmarks/gpu.py draw "$out/$shape"; fi
done
exit $status
