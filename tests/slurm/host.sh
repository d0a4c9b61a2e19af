#!/usr/bin/env bash
# Process 1 of a host: sets up what is its own, starts its daemon, and reaps orphans. Killed, it takes all others along.
set -u
name=$1 folder=$2
shift 2
hostname "$name"
mount --bind "$folder/etc" /etc/slurm
mount --bind "$folder/hosts" /etc/hosts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
ip link set lo up
trap '' TERM HUP INT
(trap - TERM HUP INT && exec "$@") &
while :; do
    wait
    sleep 1
done
