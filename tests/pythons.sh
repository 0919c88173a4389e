#!/usr/bin/env bash
# Runs the unit tests on other Pythons:  tests/pythons.sh 3.12 3.13
# Each has an environment of its own (.venv-3.12), without vLLM and torch, and one process: tests are read in only once,
# so two Pythons on two processors take less time than one after the other on both. A Python that is not on this machine
# is skipped. The last lines say what became of each.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=.venv/bin/uv

# These two ask for all that `make env` installs. They check files, which are the same on every Python.
house=tests/unit/test_house.py
export LEFT_OUT="--deselect=$house::test_installed_packages_find_what_they_need
    --deselect=$house::test_every_import_is_a_listed_dependency"

# Prints the path of an interpreter. pyenv has a `python3.12` on the PATH that runs only where its version is chosen.
interpreter() { PYENV_VERSION=$1 $uv python find --system --no-python-downloads "$1" 2> /dev/null; }

# Makes an environment; does nothing where it is up to date. The CPU lock holds for every Python that we support; as a
# constraint it gives versions and hashes. The last two packages are of the extra `cpu`: `greenprompt demo` needs them.
environment() {
    local python=$1 venv=$2 wanted
    wanted=$({ pwd; echo "$python"; cat tests/pythons.sh locks/cpu.txt pyproject.toml; } | sha256sum)
    if [ "$wanted" = "$(cat "$venv/.installed" 2> /dev/null)" ] && "$venv/bin/python" -c ''; then return; fi
    echo "making $venv with $("$python" -V)"
    $uv venv --quiet --clear --python "$python" "$venv" &&
        $uv pip install --quiet --python "$venv/bin/python" --constraint locks/cpu.txt -r pyproject.toml \
            --extra server --extra report --extra dev safetensors tokenizers &&
        $uv pip install --quiet --python "$venv/bin/python" --no-deps --no-build-isolation --editable . &&
        echo "$wanted" > "$venv/.installed"
}

declare -A line
ready=() failed=0
for version in "$@"; do
    rm -f ".venv-$version/.passed"
    if ! python=$(interpreter "$version"); then
        line[$version]="no interpreter found: skipped"
    elif environment "$python" ".venv-$version"; then
        ready+=("$version")
    fi
done

mkdir -p build
# shellcheck disable=SC2016  # for the inner shells
[ ${#ready[@]} = 0 ] || printf '%s\n' "${ready[@]}" | xargs -P "$(nproc)" -I @ sh -c \
    '.venv-@/bin/pytest -q -p no:cacheprovider $LEFT_OUT tests/unit > build/python-@.log 2>&1 && touch .venv-@/.passed; :'

for version in "${ready[@]}"; do
    cat "build/python-$version.log"
    [ ! -e ".venv-$version/.passed" ] || line[$version]=passed
done
for version in "$@"; do
    echo "Python $version: ${line[$version]=failed}"
    [ "${line[$version]}" != failed ] || failed=1
done
exit $failed
