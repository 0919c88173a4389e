#!/usr/bin/env bash
# Installs what tests/hosts and the test of the report's page need and this machine lacks, where it is Debian's to install
# and we are root; else does nothing.
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
PROGRAMS
ls /usr/lib/postgresql/*/bin/initdb > /dev/null 2>&1 || missing+=(postgresql)
[ ${#missing[@]} -gt 0 ] || exit 0
apt-get update -qq
# Servers that come with a package are not to be started: the tests have their own.
RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "${missing[@]}" > /dev/null
