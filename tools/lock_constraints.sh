#!/usr/bin/env bash
# Writes constraints.txt: the newest versions of everything in .[lab,pretrained,dev] that install together.
# usage: tools/lock_constraints.sh [PYTHON]     TORCH=2.13.0 in the environment picks another torch
set -euo pipefail
cd "$(dirname "$0")/.."

python=${1:-python3}
torch=${TORCH:-2.13.0}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"$python" -m venv "$scratch/venv"
pip=("$scratch/venv/bin/python" -m pip --disable-pip-version-check)
"${pip[@]}" install --quiet "torch==$torch" --editable '.[lab,pretrained,dev]'

# torchvision must match torch's build to the letter, and one that does not breaks `import transformers`.
if "${pip[@]}" show --quiet torchvision 2>/dev/null; then
    echo "error: a dependency pulled torchvision in; nothing here may need it" >&2
    exit 1
fi

"$scratch/venv/bin/python" - >"$scratch/constraints.txt" <<'EOF'
from importlib.metadata import distributions

print("# Exact versions of everything in .[lab,pretrained,dev], from a real installation. Regenerate: make constraints")
print("# A version that needs Python 3.11 is pinned from there on; on 3.10 pip takes the newest that runs.")
for package in sorted(distributions(), key=lambda package: package.name.lower()):
    if package.name in ("einlinear", "pip", "setuptools") or package.name.startswith(("nvidia", "cuda", "triton")):
        continue  # not ours to pin, or (CUDA) pinned by torch itself
    version = package.version.split("+")[0]  # "+cpu" names a build, not a version
    needs_311 = ">=3.11" in (package.metadata["Requires-Python"] or "")
    print(f"{package.name}=={version}" + ('; python_version >= "3.11"' if needs_311 else ""))
EOF
mv "$scratch/constraints.txt" constraints.txt
