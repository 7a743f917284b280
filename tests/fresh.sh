#!/bin/bash
# Runs the commands of the README in a clean clone of HEAD on fresh machines, as root: make fresh
#
# What a developer's machine happens to have cannot hide a missing step there. A machine is a minimal Debian made by
# debootstrap and entered by chroot, with mounts and processes of its own (namespaces): they end with it, whatever ends
# it, so nothing is ever deleted through a mount. What a machine gets of this one is how to reach the registries of
# packages: name service, CA certificates, apt's mirrors, pip's configuration. HEAD counts, not the working tree.
#
#   SYSTEMS    Debian's releases: "bookworm trixie"
#   COMMANDS   targets of make, one after the other in the same clone: "demo test"; empty: only make base systems
#   FRESH_DIR  where machines, logs, base systems and pip's downloads stay, to be used the next time;
#              else a temporary directory (in TMPDIR, or /var/tmp), removed at the end unless something failed
#   KEEP       1: the temporary directory stays in any case
#   MIRROR     a mirror of Debian, where apt's own list has none (Ubuntu)

set -euo pipefail

SELF=$(realpath "$0")
ROOT=$(dirname "$(dirname "$SELF")")
SYSTEMS=${SYSTEMS:-bookworm trixie}
COMMANDS=${COMMANDS-demo test}
CLONE=/root/netslim
GIGABYTES=15 # free disk for a machine: 9.4 after make demo on trixie, and what make test installs and writes
MACHINE_PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PATH="$PATH:/usr/sbin:/sbin" # `su` without a dash leaves them out

# By what pip finds and reaches its indexes; its other settings are a matter of taste and stay here.
VARIABLES=(
    http_proxy https_proxy no_proxy all_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY ALL_PROXY
    PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_NO_INDEX PIP_CONSTRAINT PIP_CONFIG_FILE
    PIP_TRUSTED_HOST PIP_PROXY PIP_CERT PIP_CLIENT_CERT PIP_TIMEOUT PIP_DEFAULT_TIMEOUT PIP_RETRIES
    SSL_CERT_FILE REQUESTS_CA_BUNDLE CURL_CA_BUNDLE
)
HOME_HERE=$HOME
[ -z "${SUDO_USER:-}" ] || HOME_HERE=$(getent passwd "$SUDO_USER" | cut -d: -f6)
PIP_FILES=(
    /etc/xdg/pip/pip.conf /etc/pip.conf "$HOME_HERE/.pip/pip.conf" "$HOME_HERE/.config/pip/pip.conf"
    "${PIP_CONFIG_FILE:-}"
)

stop() {
    echo "fresh: $*" >&2
    exit 2
}

# Of a number of seconds: "3 min 42 s".
lasting() {
    echo "$(($1 / 60)) min $(($1 % 60)) s"
}

# ---- What is carried over ----

# Absolute paths that pip's files and variables name, one a line. A value may go on in indented lines.
named_paths() {
    local file name
    {
        for file in "${PIP_FILES[@]}"; do
            [ ! -f "$file" ] || awk '
                /^[[:space:]]*[#;[]/ { next }
                /^[^[:space:]]/ { key = $0; sub(/[[:space:]]*[=:].*/, "", key); gsub("_", "-", key)
                                  sub(/^[^=:]*[=:]/, "") }
                key ~ /^(index-url|extra-index-url|find-links|constraint|cert|client-cert)$/' "$file"
        done
        for name in "${VARIABLES[@]}"; do
            echo "${!name:-}"
        done
    } | tr -s '[:space:]' '\n' | sed -nE 's|^(file://)?(/[^/].*)|\2|p' | sort -u
}

named_files() {
    local path
    named_paths | while read -r path; do [ ! -f "$path" ] || echo "$path"; done
}

# The pages of an index .../simple lead to files that lie beside it, as a rule: its parent is taken.
named_folders() {
    local path
    named_paths | while read -r path; do
        path=${path%/}
        [ ! -d "$path" ] || echo "${path%/simple}"
    done | sort -u
}

# This machine's sources of Debian, with SYSTEM in the place of its own release, as lines of sources.list.
sources() {
    local system=$1 here origin uri suite component
    if [ -n "${MIRROR:-}" ]; then
        printf 'deb %s %s main\n' "$MIRROR" "$system" "$MIRROR" "$system-updates"
        return
    fi
    here=$(sed -nE 's/^VERSION_CODENAME="?([a-z]+).*/\1/p' /etc/os-release)
    # shellcheck disable=SC2016  # apt's own variables
    apt-get indextargets --format '$(ORIGIN)|$(REPO_URI)|$(CODENAME)|$(COMPONENT)' 'Created-By: Packages' |
        while IFS='|' read -r origin uri suite component; do
            [ "$origin $component" = "Debian main" ] || continue
            case $suite in "$here" | "$here-updates" | "$here-security") ;; *) continue ;; esac
            # Debian's cloud images name a file that lists mirrors, which debootstrap cannot read.
            case $uri in mirror+file:*) read -r uri _ <"/${uri#mirror+file:*/}" ;; esac
            echo "deb ${uri%/} $system${suite#"$here"} main"
        done
}

mirror() {
    sources "$1" | awk -v suite="$1" '$3 == suite && !found++ { print $2 }'
}

# Lets the machine reach what this one reaches: names, certificates, apt's mirrors and proxies, pip's indexes.
carry_over() {
    local system=$1 machine=$2 file
    cp -L /etc/resolv.conf /etc/hosts "$machine/etc/"
    uname -n >"$machine/etc/hostname"
    # As Debian's installer does: SLURM, munge and gloo look their own host up.
    grep -qw "$(uname -n)" "$machine/etc/hosts" || echo "127.0.1.1 $(uname -n)" >>"$machine/etc/hosts"
    mkdir -p "$machine/usr/local/share/ca-certificates"
    [ ! -d /usr/local/share/ca-certificates ] ||
        cp -rL /usr/local/share/ca-certificates/. "$machine/usr/local/share/ca-certificates/"
    chroot "$machine" env -i PATH="$MACHINE_PATH" update-ca-certificates
    # A certificate may stand in the bundle alone.
    [ ! -f /etc/ssl/certs/ca-certificates.crt ] || cp -L /etc/ssl/certs/ca-certificates.crt "$machine/etc/ssl/certs/"
    sources "$system" >"$machine/etc/apt/sources.list"
    apt-config dump | { grep -E '^Acquire::(https?::|Check-|Retries|ForceIPv)' || true; } \
        >"$machine/etc/apt/apt.conf.d/99fresh"
    for file in "${PIP_FILES[@]}"; do
        [ ! -f "$file" ] || install -D -m 600 "$file" "$machine/${file/#"$HOME_HERE"//root}"
    done
    while read -r file; do
        install -D -m 644 "$file" "$machine$file"
    done < <(named_files)
}

# ---- In namespaces of their own ----

# Process 1 of its namespace: when it ends, the kernel ends every other process there and takes the mounts away.
inside() {
    local what=$1
    shift
    trap 'exit 143' TERM # process 1 heeds no signal without a handler
    case $what in
        build) build "$@" & ;;
        furnish) furnish "$@" & ;;
        use) use "$@" & ;;
    esac
    wait $!
}

build() {
    local system=$1 machine=$2 proxy
    proxy=$(apt-config dump --format '%v%n' Acquire::http::Proxy)
    # wget, which debootstrap uses, does not read apt's configuration.
    export http_proxy="${http_proxy:-${proxy%DIRECT}}"
    debootstrap --variant=minbase --include=ca-certificates,python3,make,git "$system" "$machine" "$(mirror "$system")"
}

furnish() {
    local system=$1 machine=$2
    carry_over "$system" "$machine"
    git clone --quiet --no-local "$ROOT" "$machine$CLONE" # --no-local: only what is committed, as from afar
}

use() {
    local machine=$1 target=$2 folder name
    local environment=(HOME=/root PATH="$MACHINE_PATH" LANG=C.UTF-8)
    for name in "${VARIABLES[@]}"; do
        [ -z "${!name:-}" ] || environment+=("$name=${!name}")
    done
    mount -t proc proc "$machine/proc"
    mount -t sysfs -o ro sysfs "$machine/sys"
    mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts "$machine/dev/pts"
    mount -t tmpfs -o mode=1777 tmpfs "$machine/dev/shm" # DataLoader's workers and gloo need a real one
    while read -r folder; do
        mkdir -p "$machine$folder"
        mount --bind "$folder" "$machine$folder"
        mount -o remount,bind,ro "$machine$folder"
    done < <(named_folders)
    if [ -n "${PIP_CACHE:-}" ]; then
        mkdir -p "$machine/root/.cache/pip"
        mount --bind "$PIP_CACHE" "$machine/root/.cache/pip"
    fi
    # A shell's background processes ignore SIGINT, and Python would go on doing so: tests send it.
    exec chroot "$machine" env -i --default-signal=INT,QUIT -C "$CLONE" "${environment[@]}" make "$target"
}

# ---- What is needed ----

missing=()
check_needs() {
    local program name
    [ "$(id -u)" = 0 ] || stop "mount and chroot need root, this is user $(id -un); try: sudo make fresh"
    command -v apt-get >/dev/null ||
        stop "apt's mirrors and debootstrap are needed, there is no apt-get; run it on Debian or Ubuntu"
    for program in unshare setsid flock mount chroot awk tar; do
        command -v "$program" >/dev/null ||
            stop "$program is needed and is not on PATH; try: apt-get install util-linux coreutils mawk tar"
    done
    for name in $SYSTEMS $COMMANDS; do
        [[ $name =~ ^[a-z][a-z-]*$ ]] || stop "SYSTEMS and COMMANDS are names in small letters, not '$name'; see $SELF"
    done
    command -v git >/dev/null || missing+=(git)
    command -v debootstrap >/dev/null || missing+=(debootstrap)
    [ -f /usr/share/keyrings/debian-archive-keyring.gpg ] || missing+=(debian-archive-keyring)
    # apt knows its mirrors' releases by its lists, which images often lack.
    if [ ${#missing[@]} -gt 0 ] || [ -z "$(mirror bookworm)" ]; then
        apt-get update -qq || stop "apt-get update failed; see above"
    fi
    if [ ${#missing[@]} -gt 0 ]; then
        echo "installing system packages: ${missing[*]}"
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >/dev/null ||
            stop "${missing[*]} could not be installed; try: apt-get install ${missing[*]}"
    fi
    for name in $SYSTEMS; do
        [ -e "/usr/share/debootstrap/scripts/$name" ] ||
            stop "debootstrap knows no release '$name'; SYSTEMS takes those in /usr/share/debootstrap/scripts"
        [ -n "$(mirror "$name")" ] ||
            stop "apt's sources here hold no mirror of Debian for $name; name one: make fresh MIRROR=http://HOST/debian"
    done
    unshare --mount --pid --mount-proc --fork true 2>/dev/null ||
        stop "unshare may not make mount and process namespaces here; a container wants --privileged"
}

# ---- The run ----

# Removes a machine, or the directory of all. Here none of their mounts can be seen, unless someone made one by hand.
remove() {
    local place
    place=$(realpath -m "$1")
    ! grep -qF " $place/" /proc/self/mountinfo || stop "something is mounted below $place; umount it first"
    rm -rf --one-file-system "$place"
}

job=
# Runs `inside "$@"` in namespaces, and in a session so that a signal from the terminal reaches this shell alone.
apart() {
    local log=$1 status=0
    shift
    setsid unshare --mount --propagation private --pid --mount-proc --fork --kill-child \
        "$SELF" "$@" </dev/null >>"$log" 2>&1 &
    job=$!
    wait "$job" || status=$?
    job=
    return "$status"
}

interrupt() {
    trap '' INT TERM HUP
    if [ -n "$job" ]; then
        kill -TERM -- "-$job" 2>/dev/null || true
        wait "$job" || true
    fi
    exit 130
}

results=()
failed=0
# Notes how something ended, and shows the end of its log where it failed.
note() {
    local system=$1 what=$2 status=$3 seconds=$4 log=$5 result=ok
    if [ "$status" != 0 ]; then
        result="failed ($status)"
        failed=1
        echo "$system: $what failed; the last lines of $log:"
        tail -n 30 "$log" | sed 's/^/    /'
    fi
    echo "$system: $what: $result, $(lasting "$seconds")"
    results+=("$system|$what|$result|$(lasting "$seconds")")
}

# Makes a machine with a clone in it, of the base system kept from the last time where there is one.
set_up() {
    local system=$1 machine=$2 log=$3 base=$DIR/base/$1.tar free
    mkdir -p "$machine"
    free=$(df --output=avail -BG "$machine" | tr -dc '0-9')
    [ "$free" -ge "$GIGABYTES" ] ||
        stop "a machine needs $GIGABYTES GB of disk and $DIR has $free free; name a FRESH_DIR with more"
    if [ -f "$base" ]; then
        tar -C "$machine" --numeric-owner -xpf "$base" || return
    else
        apart "$log" build "$system" "$machine" || return
        rm -f "$machine"/var/cache/apt/archives/*.deb
        tar -C "$machine" --numeric-owner -cf "$base.part" . && mv "$base.part" "$base" || return
    fi
    apart "$log" furnish "$system" "$machine"
}

try_out() {
    local system=$1 machine=$DIR/machines/$1 log=$DIR/logs/$1-setup.log began status=0 target of=made
    remove "$machine" # before the clock starts: that of the last time holds ten gigabytes
    [ ! -f "$DIR/base/$system.tar" ] || of="unpacked from $DIR/base/$system.tar"
    echo "$system: base system, $of: $log"
    : >"$log"
    began=$SECONDS
    set_up "$system" "$machine" "$log" || status=$?
    note "$system" "base system" "$status" $((SECONDS - began)) "$log"
    [ "$status" = 0 ] || return 0
    for target in $COMMANDS; do
        log=$DIR/logs/$system-$target.log
        echo "$system: make $target: $log"
        echo "Debian $(cat "$machine/etc/debian_version"), $(nproc) cores, $(git -C "$machine$CLONE" log -1 \
            --format='%h %s'), $(date -u +%FT%TZ)" >"$log"
        began=$SECONDS status=0
        apart "$log" use "$machine" "$target" || status=$?
        note "$system" "make $target" "$status" $((SECONDS - began)) "$log"
    done
    # One machine's gigabytes at a time.
    [ -n "${FRESH_DIR:-}" ] || [ "${KEEP:-}" = 1 ] || [ "$failed" = 1 ] || remove "$machine"
}

finish() {
    local status=$?
    if [ -n "${FRESH_DIR:-}" ] || [ "${KEEP:-}" = 1 ] || { [ "$status" != 0 ] && [ "$status" != 130 ]; }; then
        echo "machines and logs stay in $DIR"
    else
        remove "$DIR"
    fi
}

main() {
    local folders system what result time
    check_needs
    DIR=$(realpath -m "${FRESH_DIR:-$(mktemp -d "${TMPDIR:-/var/tmp}/fresh.XXXXXX")}")
    mkdir -p "$DIR/machines" "$DIR/logs" "$DIR/base"
    exec {lock}>"$DIR/.lock"
    flock -n "$lock" || stop "$DIR is in use by another run; wait for it, or name another FRESH_DIR"
    trap finish EXIT
    trap interrupt INT TERM HUP
    if [ -n "${FRESH_DIR:-}" ]; then
        # pip's downloads may come from the last time, but not the wheels it built: they would hide a missing compiler.
        export PIP_CACHE="$DIR/pip"
        rm -rf "$PIP_CACHE/wheels"
        mkdir -p "$PIP_CACHE"
    fi

    echo "commit $(git -C "$ROOT" rev-parse --short HEAD); not in it:" \
        "$(git -C "$ROOT" --no-optional-locks status --porcelain | wc -l) changed files of the working tree"
    echo "carried over: name service, CA certificates, apt's sources and proxies, pip's configuration"
    folders=$(named_folders | paste -sd ' ')
    [ -z "$folders" ] || echo "bound read-only, since pip's configuration names them: $folders"
    for system in $SYSTEMS; do
        try_out "$system"
    done
    echo
    for result in 'system|command|result|time' "${results[@]}"; do
        IFS='|' read -r system what result time <<<"$result"
        printf '%-10s  %-12s  %-12s  %12s\n' "$system" "$what" "$result" "$time"
    done
    return "$failed"
}

case ${1:-} in
    build | furnish | use) inside "$@" ;;
    *) main ;;
esac
