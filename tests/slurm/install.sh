#!/usr/bin/env bash
# What the tests of tests/slurm take beside Python: Debian's SLURM, and PMIx for it. `make test` calls it; root only.
set -euo pipefail
packages=(slurmctld slurmd slurm-client libpmix-dev iproute2)
missing=()
for package in "${packages[@]}"; do
    dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "tests: no ${missing[*]} here, and no apt-get as root: the tests of SLURM are skipped" >&2
    exit 0
fi
echo "tests: installing ${missing[*]}"
{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } \
    >/dev/null || echo "tests: apt-get could not install ${missing[*]}: the tests of SLURM are skipped" >&2
