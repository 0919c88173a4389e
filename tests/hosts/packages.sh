#!/usr/bin/env bash
# Installs what tests/hosts, the tests of the report's page and of configs/front, and `make test-pythons` need and this
# machine lacks, where it is Debian's to install and we are root; else does nothing.
set -euo pipefail
[ "$(id -u)" = 0 ] && command -v apt-get > /dev/null || exit 0
export PATH=$PATH:/usr/sbin:/sbin DEBIAN_FRONTEND=noninteractive
missing=()
while read -r program package; do
    command -v "$program" > /dev/null || missing+=("$package")
done << 'PROGRAMS'
ip iproute2
nft nftables
sshd openssh-server
rsync rsync
redis-server redis-server
redis-cli redis-tools
chromium chromium
caddy caddy
haproxy haproxy
PROGRAMS
ls /usr/lib/postgresql/*/bin/initdb > /dev/null 2>&1 || missing+=(postgresql)
[ ${#missing[@]} = 0 ] || apt-get update -qq
# A release of Debian or Ubuntu has one Python, or a few. pyenv has a name for each that it knows, chosen or not.
for version in 3.12 3.13; do
    PYENV_VERSION=$version "python$version" -c '' 2> /dev/null || ! apt-cache show "python$version" > /dev/null 2>&1 ||
        missing+=("python$version")
done
[ ${#missing[@]} -gt 0 ] || exit 0
# Servers that come with a package are not to be started: the tests have their own.
RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "${missing[@]}" > /dev/null
