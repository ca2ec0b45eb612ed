# Sourced by tools/fetch_*.sh, which put what is in Debian packages into the data folder. They set
#   what       the name of the data, as a sentence begins with it
#   target     where the data belong
#   elsewhere  what to do where there is no apt-get

fail() {
    echo "$what could not be fetched: $*" >&2
    exit 1
}

unpack() { # puts what is in packages $2 and on, which are $1 to download, into $scratch/root
    local size=$1 dir=${target%/*} apt=(apt-get --quiet -o Acquire::Retries=1 -o Acquire::http::Timeout=10) package deb
    shift
    command -v apt-get >/dev/null && command -v dpkg >/dev/null ||
        fail "this needs apt-get and dpkg (Debian, Ubuntu). Elsewhere, $elsewhere"
    mkdir -p "$dir" || fail "$dir cannot be written"

    # Beside the target, so that the last step is a rename: nobody ever sees half of the data.
    scratch=$(mktemp -d "$dir/.fetch-XXXXXX")
    trap 'rm -rf "$scratch"' EXIT
    chmod 755 "$scratch"

    download() { (cd "$scratch" && "${apt[@]}" download "$1" >log 2>&1); }

    echo "Fetching $size into $target"
    for package; do
        if ! download "$package" && [ "$(id -u)" = 0 ] && ! apt-cache show "$package" >/dev/null 2>&1; then
            echo "  package lists"
            "${apt[@]}" update >"$scratch/log" 2>&1 || fail "apt-get update failed: $(tail -n 1 "$scratch/log")"
            download "$package" || true
        fi
        deb=$(find "$scratch" -maxdepth 1 -name "${package}_*.deb")
        [ -n "$deb" ] ||
            fail "apt-get download $package: $(tail -n 1 "$scratch/log") (package lists missing? run apt-get update)"
        echo "  $package, $(($(stat -c %s "$deb") / 1024)) KB"
        dpkg -x "$deb" "$scratch/root" || fail "$package could not be unpacked"
    done
}
