#!/bin/busybox sh
# shellcheck shell=dash
# First program of the guest: finds the root file system (second disk) and goes there.
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
while read -r module; do $b insmod "/mod/$module"; done < /mod/order
n=0
while [ ! -b /dev/vdc ] && [ $n -lt 200 ]; do $b usleep 100000; n=$((n + 1)); done
$b mount -t ext4 -o ro /dev/vdb /root || $b poweroff -f
for place in dev proc sys; do $b mount --move /$place /root/$place; done
exec $b switch_root /root /sbin/guest-init
