#!/usr/bin/env bash
# Puts Fashion-MNIST (Debian package dataset-fashion-mnist, 31 MB, MIT licence) into DIR/fashion-mnist. Needs no root.
# usage: tools/fetch_fashion_mnist.sh [DIR]     DIR: by default $EINLINEAR_DATA, else ~/.cache/einlinear
set -euo pipefail

package=dataset-fashion-mnist
what="Fashion-MNIST"
target=${1:-${EINLINEAR_DATA:-$HOME/.cache/einlinear}}/fashion-mnist
elsewhere="the library downloads the data itself."
source "${BASH_SOURCE[0]%fetch_*}debian.sh"

complete() { # is every file of the data set in folder $1 and whole?
    local name
    for name in train-images-idx3 train-labels-idx1 t10k-images-idx3 t10k-labels-idx1; do
        gzip --test "$1/$name-ubyte.gz" 2>/dev/null || return 1
    done
}

complete "$target" && exit 0
unpack "31 MB" "$package"
unpacked=$scratch/root/usr/share/datasets/fashion-mnist
complete "$unpacked" || fail "$package does not hold the files it should"
cp "$scratch/root/usr/share/doc/$package/copyright" "$unpacked/"
rm -rf "$target"
mv "$unpacked" "$target"
