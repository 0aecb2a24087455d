#!/bin/sh
# Print the path of a Chromium for the tests that open pages: $CHROMIUM, one on PATH, or the one that the npm package
# @sparticuz/chromium carries, unpacked once into the cache of scripts/environment.sh. Status 1 where none runs.
set -eu

package=@sparticuz/chromium@147.0.0
cache=${AXOLOTL_BITNET_CACHE:-$HOME/.cache/axolotl-bitnet}/chromium-${package##*@}

for name in "${CHROMIUM:-}" chromium chromium-headless-shell google-chrome google-chrome-stable chromium-browser; do
    [ -z "$name" ] || ! command -v "$name" || exit 0
done
if [ ! -x "$cache/chromium" ]; then
    command -v npm >/dev/null || { echo "browser: there is no Chromium here, and no npm to install one" >&2; exit 1; }
    mkdir -p "$cache"
    npm install --silent --no-audit --no-fund --prefix "$cache" "$package" >&2
    cd "$cache"
    # It unpacks into the system's folder for temporary files.
    TMPDIR=$cache node --input-type=module \
        -e "import c from '@sparticuz/chromium'; await c.executablePath()" >&2
fi
"$cache/chromium" --version >/dev/null || { echo "browser: $cache/chromium does not run here" >&2; exit 1; }
echo "$cache/chromium"
