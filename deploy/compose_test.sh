#!/usr/bin/env bash
# The containers of compose.yaml, end to end, on a bare Debian 12 or 13 machine as root: `make compose-test`.
#
# Where no Docker engine runs it installs Debian's and starts one for the time of the test. The base image is made from
# Debian packages under the name that deploy/Dockerfile names, with this machine's certificates and pip settings inside, so
# that nothing comes from an image registry. What it makes it takes away again, but for installed packages and build cache.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
BASE=$(sed -n 's/^ARG BASE=//p' deploy/Dockerfile)
TORCH=$(sed -n 's/^TORCH ?= //p' Makefile)
WORK=$(mktemp -d)
export TWOSTROKE_PORT=${TWOSTROKE_PORT:-18600}
COMPOSE=(docker compose --project-name twostroke-test --file compose.yaml --file "$WORK/override.yaml")
ENGINE=

say() { printf '\n== %s\n' "$*"; }

finish() {
    status=$?
    set +e
    if [ "$status" -ne 0 ] && [ -f "$WORK/override.yaml" ]; then
        "${COMPOSE[@]}" ps --all
        "${COMPOSE[@]}" logs --tail 30 --no-color
    fi
    [ -f "$WORK/override.yaml" ] && "${COMPOSE[@]}" down --volumes --timeout 5 > "$WORK/down.log" 2>&1
    [ -n "$ENGINE" ] && kill "$ENGINE" && wait "$ENGINE"
    rm -rf "$WORK"
    exit "$status"
}
trap finish EXIT

install() {
    apt-get -qq update
    DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends "$@" > "$WORK/apt.log"
}

# Compose as a plugin of the docker command. Debian 13 has it; for Debian 12, whose package is the first Compose, the one
# of Debian 13 is unpacked beside everything else: it needs nothing newer than Debian 12's C library.
compose_plugin() {
    local mirror apt plugins=$WORK/docker/cli-plugins
    apt-get -qq update
    if apt-cache policy docker-compose | grep -q 'Candidate: 2'; then
        install docker-compose
        return
    fi
    mirror=$(cat /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list 2> /dev/null | sed -n -E 's/^(URIs: |deb )(http[^ ]+).*/\2/p' || true)
    mirror=${mirror%%$'\n'*}
    mkdir -p "$WORK/apt/lists/partial" "$WORK/apt/cache/archives/partial" "$plugins"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" > "$WORK/apt/sources.list"
    apt=(-qq -o Dir::Etc::sourcelist="$WORK/apt/sources.list" -o Dir::Etc::sourceparts=- -o Dir::State::lists="$WORK/apt/lists"
        -o Dir::Cache="$WORK/apt/cache" -o APT::Sandbox::User=root)
    apt-get "${apt[@]}" update
    (cd "$WORK/apt" && apt-get "${apt[@]}" download docker-compose && dpkg-deb --extract docker-compose_*.deb unpacked)
    cp "$WORK/apt/unpacked/usr/libexec/docker/cli-plugins/docker-compose" "$plugins/"
    export DOCKER_CONFIG=$WORK/docker
}

base_image() {
    local root=$WORK/base
    command -v mmdebstrap > /dev/null || install mmdebstrap
    mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$root"
    cp --dereference /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
    mkdir "$root/opt/wheels"
    "$PYTHON" -m pip -qq download --no-deps --dest "$root/opt/wheels" --only-binary :all: --implementation cp --python-version 3.11 \
        --platform manylinux_2_28_x86_64 --platform linux_x86_64 "$TORCH"
    printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\nfind-links = /opt/wheels\n' > "$root/etc/pip.conf"
    tar --directory "$root" --create . | docker import - "$BASE" > /dev/null
    rm -rf "$root"
}

say "a Docker engine with Compose"
if ! docker info > /dev/null 2>&1; then
    command -v dockerd > /dev/null || install docker.io iptables
    dockerd --data-root "${DOCKER_DATA:-/var/lib/docker}" > "$WORK/dockerd.log" 2>&1 &
    ENGINE=$!
    for _ in $(seq 60); do docker info > /dev/null 2>&1 && break; sleep 0.5; done
    docker info > /dev/null || { tail -5 "$WORK/dockerd.log"; exit 1; }
fi
docker compose version > /dev/null 2>&1 || compose_plugin
docker compose version
docker image inspect "$BASE" > /dev/null 2>&1 || { say "a base image, as $BASE"; base_image; }

say "images"
cat > "$WORK/override.yaml" << YAML
x-part: &part {build: {args: {TORCH: "$TORCH"}}, environment: {TWOSTROKE_THREADS: 1}}
services: {router: *part, prefill: *part, decode: *part}
YAML
"${COMPOSE[@]}" --profile observability config --quiet
"${COMPOSE[@]}" --file compose.gpu.yaml config --quiet
"${COMPOSE[@]}" build --quiet router
docker image ls twostroke

say "up"
"${COMPOSE[@]}" up --detach --wait --wait-timeout 300 --no-build
"$PYTHON" deploy/compose_test.py one-pair

say "hardening"
for service in router prefill decode; do
    "${COMPOSE[@]}" exec -T "$service" sh -ec '
        [ "$(id -u)" = 10001 ]
        grep -q "^CapEff:.0000000000000000$" /proc/self/status
        grep -q "^NoNewPrivs:.1$" /proc/self/status
        if touch /app/x /x 2> /dev/null; then echo "the root is writable"; exit 1; fi
        if command -v gcc || command -v pip; then exit 1; fi'
done
"${COMPOSE[@]}" exec -T decode sh -ec 'ls -l /dev/shm; [ -z "$(find /dev/shm -type f -perm /077)" ]'
[ "$("${COMPOSE[@]}" port router 8600)" = "127.0.0.1:$TWOSTROKE_PORT" ]

say "two of each"
"${COMPOSE[@]}" up --detach --wait --wait-timeout 300 --no-build --no-recreate --scale prefill=2 --scale decode=2
"$PYTHON" deploy/compose_test.py two-pairs

say "a decode and a prefill worker are killed while requests run"
"$PYTHON" deploy/compose_test.py survive "${COMPOSE[@]}"

say "the router is restarted"
"${COMPOSE[@]}" restart --timeout 5 router
"$PYTHON" deploy/compose_test.py one-pair

say "down"
"${COMPOSE[@]}" down --volumes --timeout 20
[ -z "$(docker ps --all --quiet --filter label=com.docker.compose.project=twostroke-test)" ]
say "passed"
