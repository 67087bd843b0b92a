#!/bin/sh
# The guest's init: mounts, network, then what the node's own disk says.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/run PYTHONPATH=/opt/spire-hw
mount -t securityfs securityfs /sys/kernel/security
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
mount -t ext4 /dev/vdc /mnt
ip link set lo up
ip link set eth0 up
ip addr add 10.0.2.15/24 dev eth0
ip route add default via 10.0.2.2
sh /mnt/run.sh
sync
busybox umount -f /mnt
busybox poweroff -f
