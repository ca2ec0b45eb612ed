#!/usr/bin/env bash
# Puts Fashion-MNIST (Debian package dataset-fashion-mnist, 31 MB, MIT licence) into DIR/fashion-mnist. Needs no root.
# usage: tools/fetch_fashion_mnist.sh [DIR]     DIR: by default $EINLINEAR_DATA, else ~/.cache/einlinear
set -euo pipefail

package=dataset-fashion-mnist
dir=${1:-${EINLINEAR_DATA:-$HOME/.cache/einlinear}}
target=$dir/fashion-mnist

fail() {
    echo "Fashion-MNIST could not be fetched: $*" >&2
    exit 1
}

complete() { # is every file of the data set in folder $1 and whole?
    local name
    for name in train-images-idx3 train-labels-idx1 t10k-images-idx3 t10k-labels-idx1; do
        gzip --test "$1/$name-ubyte.gz" 2>/dev/null || return 1
    done
}

complete "$target" && exit 0
command -v apt-get >/dev/null && command -v dpkg >/dev/null ||
    fail "this needs apt-get and dpkg (Debian, Ubuntu). Elsewhere the library downloads the data itself."
mkdir -p "$dir" || fail "$dir cannot be written"

# Beside the target, so that the last step is a rename: nobody ever sees half of the data.
scratch=$(mktemp -d "$dir/.fetch-XXXXXX")
trap 'rm -rf "$scratch"' EXIT
chmod 755 "$scratch"

apt=(apt-get --quiet -o Acquire::Retries=1 -o Acquire::http::Timeout=10)
download() { (cd "$scratch" && "${apt[@]}" download "$package" >log 2>&1); }

echo "Fetching Fashion-MNIST (31 MB) into $target"
if ! download && [ "$(id -u)" = 0 ] && ! apt-cache show "$package" >/dev/null 2>&1; then
    "${apt[@]}" update >"$scratch/log" 2>&1 || fail "apt-get update failed: $(tail -n 1 "$scratch/log")"
    download || true
fi
deb=$(find "$scratch" -name "${package}_*.deb")
[ -n "$deb" ] || fail "apt-get download $package: $(tail -n 1 "$scratch/log") (package lists missing? run apt-get update)"

dpkg -x "$deb" "$scratch/root" || fail "$package could not be unpacked"
unpacked=$scratch/root/usr/share/datasets/fashion-mnist
complete "$unpacked" || fail "$package does not hold the files it should"
cp "$scratch/root/usr/share/doc/$package/copyright" "$unpacked/"
rm -rf "$target"
mv "$unpacked" "$target"
