#!/usr/bin/env bash
# Puts about 20 MB of English text (12 MB to download) into DIR/english. Needs no root.
# usage: tools/fetch_english.sh [DIR]     DIR: by default $EINLINEAR_DATA, else ~/.cache/einlinear
#   anarchism       essays (GPL-2+), as HTML pages
#   bible-kjv-text  the King James Bible (public domain), which the program of bible-kjv prints
#   dict-foldoc     a dictionary of computing (GFDL)
set -euo pipefail

packages=(anarchism bible-kjv bible-kjv-text dict-foldoc)
verses=31102
what="The English text"
target=${1:-${EINLINEAR_DATA:-$HOME/.cache/einlinear}}/english
elsewhere="give einlinear prepare a text of your own."
source "${BASH_SOURCE[0]%fetch_*}debian.sh"

complete() { # is the text in folder $1 what was once put there?
    (cd "$1" && sha256sum --check --strict --status SHA256SUMS) 2>/dev/null
}

if complete "$target"; then
    echo "The English text is in $target"
    exit 0
fi
unpack "12 MB" "${packages[@]}"

text=$scratch/english
mkdir -p "$text/copyright"
for package in "${packages[@]}"; do
    cp -L "$scratch/root/usr/share/doc/$package/copyright" "$text/copyright/$package" ||
        fail "$package does not say its licence"
done

cp -rL "$scratch/root/usr/share/doc/anarchism/html" "$text/anarchism" ||
    fail "anarchism does not hold the pages it should"
[ "$(find "$text/anarchism" -name '*.html' | wc -l)" -gt 0 ] || fail "anarchism holds no pages"
find "$text/anarchism" -type f ! -name '*.html' -delete

cp "$scratch/root/usr/share/dictd/foldoc.dict.dz" "$text/" || fail "dict-foldoc does not hold its dictionary"
gzip --test --stdout <"$text/foldoc.dict.dz" 2>/dev/null || fail "the dictionary of dict-foldoc is damaged"

# The program looks for its data in the working directory. -f: one line per verse, which begins with its place.
(cd "$scratch/root/usr/lib" && "$scratch/root/usr/bin/bible" -f gen1:1-rev22:21) >"$scratch/verses" 2>"$scratch/log" ||
    fail "the program of bible-kjv does not run: $(tail -n 1 "$scratch/log") (it needs libreadline8)"
[ "$(wc -l <"$scratch/verses")" -eq $verses ] || fail "bible-kjv printed $(wc -l <"$scratch/verses") verses, not $verses"
sed -E 's/^[^ ]+ +//' "$scratch/verses" >"$text/kjv.txt"

(cd "$text" && find . -type f ! -name SHA256SUMS -print0 | sort -z | xargs -0 sha256sum >SHA256SUMS)
complete "$text" || fail "$text could not be written whole"
rm -rf "$target"
mv "$text" "$target"
echo "Done. Next: einlinear prepare english --out DIR"
