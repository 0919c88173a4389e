#!/usr/bin/env bash
# Makes an environment from the locks:  locks/install.sh cpu .venv   or   locks/install.sh gpu .venv-gpu
# Does nothing where it is up to date. The stamp comes last, so an interrupted run is done anew.
set -euo pipefail
cd "$(dirname "$0")/.."
extra=$1 venv=$2 stamp=$2/.installed
torch=$(sed -n 's/^torch==\([0-9.]*\)+cpu .*/\1/p' locks/torch-cpu.txt)
case $extra in
    cpu) need_gib=6 size="about 4 GB" ;;
    gpu) need_gib=20 size="up to 20 GB" ;;
    *) echo "usage: $0 cpu|gpu DIRECTORY" >&2; exit 2 ;;
esac
fail() { echo "cannot make $venv: $*" >&2; exit 1; }

# One at a time: a second run, or one started while an interrupted one still dies, waits.
exec 9< locks/install.sh
flock 9

# An environment knows its place: a tree that was moved needs a new one.
wanted=$(
    { pwd; cat locks/install.sh locks/installer.txt "locks/$extra.txt" locks/torch-cpu.txt pyproject.toml; } | sha256sum
)
if [ "$wanted" = "$(cat "$stamp" 2>/dev/null)" ] && "$venv/bin/python" -c '' 2>/dev/null; then exit 0; fi

# torch for CPUs is on no package registry. Where pip is told of a folder (or page) of wheels, it is there; uv knows
# PyTorch's own index otherwise.
find_links=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-$(python3 -m pip config get global.find-links 2>/dev/null || true)}}

# A Python suits if it is 3.11–3.13, can make environments and, where torch comes from a folder, has its wheel there.
# Prints why not.
suits() {
    "$1" - "$extra" "$torch" "$find_links" 2>/dev/null <<'PYTHON'
import sys
from pathlib import Path

extra, torch, find_links = sys.argv[1:]
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    print("is Python %d.%d" % sys.version_info[:2])
    sys.exit(1)
try:
    import ensurepip, venv
except ImportError:
    print("has no venv module (Debian, Ubuntu: apt-get install python3-venv)")
    sys.exit(1)
wheels = [w.name for d in find_links.replace(",", " ").split() for w in Path(d).glob(f"torch-{torch}+cpu-*.whl")]
if extra == "cpu" and wheels and not any("-cp%d%d-" % sys.version_info[:2] in w for w in wheels):
    print(f"has no torch wheel in {find_links}")
    sys.exit(1)
PYTHON
}
python='' problems=''
for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if problem=$(suits "$candidate"); then python=$candidate; break; fi
    problems+="; $candidate ${problem:-does not run}"
done
[ -n "$python" ] || fail "it takes a Python 3.11, 3.12 or 3.13 (make PYTHON=/path/to/python names one)$problems"
free_kib=$(df -Pk . | awk 'NR == 2 { print $4 }')
[ "$free_kib" -ge $((need_gib << 20)) ] || fail "it needs about $need_gib GiB of disk, $((free_kib >> 20)) GiB are free"

echo "making $venv with $("$python" -V): $size of packages, which takes some minutes"
rm -rf "$venv"
"$python" -m venv "$venv"
# pip's and uv's temporary files, the locks that uv leaves among them, go with this.
export TMPDIR=$PWD/$venv/tmp
mkdir "$TMPDIR"
"$venv/bin/python" -m pip install -qq --disable-pip-version-check --require-hashes -r locks/installer.txt
# Bytecode is made once, here: Ray starts many processes, and where none is written each would make its own.
install() { "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --no-deps --compile-bytecode "$@"; }
install --require-hashes -r "locks/$extra.txt"
if [ "$extra" = cpu ]; then
    if [ -n "$find_links" ]; then
        # shellcheck disable=SC2086  # pip separates several by blanks
        UV_FIND_LINKS=$(echo $find_links | tr ' ' ,) install --require-hashes -r locks/torch-cpu.txt
    else
        install --torch-backend=cpu --require-hashes -r locks/torch-cpu.txt
    fi
fi
install --no-build-isolation --editable .
rm -rf "$TMPDIR"
echo "$wanted" > "$stamp"
