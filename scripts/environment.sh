#!/bin/sh
# Print the path of a virtual environment that is ready for this checkout, making it first where there is none.
#
#   scripts/environment.sh oldest       Python 3.11 and the oldest supported Axolotl (requirements/oldest.txt)
#   scripts/environment.sh latest       Python 3.12 and the newest (requirements/latest.txt)
#   scripts/environment.sh any          whichever of the two is there, else whichever can be made
#   scripts/environment.sh python 3.12  no environment, only the path of a Python of that version that runs
#
# Only the path goes to stdout. Environments live outside the checkout, in $AXOLOTL_BITNET_CACHE (by default
# ~/.cache/axolotl-bitnet), one for each hash of what is installed, and are shared by all checkouts.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd -P)
cache=${AXOLOTL_BITNET_CACHE:-$HOME/.cache/axolotl-bitnet}

say() { echo "environment: $*" >&2; }

# candidates X.Y: every file that may be Python X.Y, the likeliest first
candidates() {
    for name in "python$1" python3 python; do
        echo "$PATH" | tr ':' '\n' | sed "s|\$|/$name|"
    done
    for pyenv in "${PYENV_ROOT:-}" "$(pyenv root 2>/dev/null || :)" "$HOME/.pyenv"; do
        ls -1 "$pyenv"/versions/"$1"*/bin/"python$1" 2>/dev/null || :
    done
    uv python find "$1" 2>/dev/null || :
}

# find_python X.Y: the first candidate that runs, has that version, and can make environments. It is run, not just
# looked up: a version manager's shim is on PATH even where its version is not to be had, and Debian's python3 may
# come without ensurepip.
find_python() {
    candidates "$1" | while IFS= read -r candidate; do
        [ -x "$candidate" ] || continue
        "$candidate" -c "import sys, ensurepip, venv
assert sys.version_info[:2] == tuple(map(int, '$1'.split('.')))
print(sys.executable)" 2>/dev/null </dev/null && break
    done
}

version_of() { case $1 in oldest) echo 3.11 ;; latest) echo 3.12 ;; esac; }

missing() {
    say "no working Python $1 (with its venv and ensurepip modules) was found."
    say "Install one, for instance: apt install python$1 python$1-venv | brew install python@$1 |" \
        "pyenv install $1 | uv python install $1"
    exit 1
}

# folder PYTHON LANE: where the environment is, or will be. The name holds a hash of all that is installed in it.
folder() {
    hash=$(cd "$root" && "$1" - "requirements/$2.txt" <<'PYTHON'
import hashlib, json, pathlib, sys, tomllib

project = tomllib.loads(pathlib.Path("pyproject.toml").read_text(encoding="utf-8"))
wanted = [pathlib.Path(name).read_text(encoding="utf-8") for name in (sys.argv[1], "requirements/tools.txt")]
wanted += [project["project"]["dependencies"], project["project"]["optional-dependencies"]["axolotl"]]
wanted += [project["build-system"]["requires"]]
print(hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:12])
PYTHON
    )
    echo "$cache/$2-$hash"
}

# The stamp is written last, so an interrupted environment is not taken for a whole one; and the Python that it was
# made from may have been uninstalled since.
is_ready() { [ -f "$1/.complete" ] && "$1/bin/python" -c 'import pip' 2>/dev/null; }

# make_environment PYTHON LANE FOLDER
make_environment() {
    say "making $3 with $1: once, some minutes, several GB"
    rm -rf "$3"
    "$1" -m venv "$3"
    "$3/bin/python" -c 'import sys, tomllib
project = tomllib.load(sys.stdin.buffer)["project"]
print(*project["dependencies"], *project["optional-dependencies"]["axolotl"], sep="\n")' \
        <"$root/pyproject.toml" >"$3/project.txt"
    "$3/bin/python" -m pip install --progress-bar off -r "$root/requirements/$2.txt" -r "$3/project.txt"
    touch "$3/.complete"
}

# point_here FOLDER: install this checkout editable. Left alone where that is done, for another run may be using it.
point_here() {
    state=$(echo "$root" && grep '^__version__' "$root/src/axolotl_bitnet/__init__.py" && cat "$root/pyproject.toml")
    if [ "$state" != "$(cat "$1/.checkout" 2>/dev/null)" ]; then
        rm -f "$1/.checkout"
        "$1/bin/python" -m pip install --quiet --no-deps --no-build-isolation --editable "$root"
        printf '%s\n' "$state" >"$1/.checkout"
    fi
}

lane=${1:-}
case $lane in
oldest | latest) ;;
any)
    lane=
    for each in oldest latest; do
        python=$(find_python "$(version_of "$each")")
        [ -n "$python" ] || continue
        lane=${lane:-$each}
        if is_ready "$(folder "$python" "$each")"; then
            lane=$each
            break
        fi
    done
    [ -n "$lane" ] || missing 3.11
    ;;
python)
    python=$(find_python "${2:?which version?}")
    [ -n "$python" ] || missing "$2"
    echo "$python"
    exit
    ;;
*)
    say "usage: $0 oldest | latest | any | python X.Y"
    exit 2
    ;;
esac

python=$(find_python "$(version_of "$lane")")
[ -n "$python" ] || missing "$(version_of "$lane")"
environment=$(folder "$python" "$lane")
mkdir -p "$cache"
(
    # one maker of each at a time, where there is flock; the lock goes when the process does
    ! command -v flock >/dev/null || flock 9
    is_ready "$environment" || make_environment "$python" "$lane" "$environment"
    point_here "$environment"
) 9>"$cache/.$lane.lock" >&2
echo "$environment"
