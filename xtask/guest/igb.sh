# Our driver on the second network card against Linux's on the first; then Linux's gets the second back, and both talk.
ours=$VFIO_URING_DEVICE
theirs=$VFIO_URING_TEST_PEER
trap '[ $? = 0 ] || dmesg | tail -n 12' EXIT
/tests/vfio-uring-cli.igb_on_device --color=never --show-output

interface() {
    ls "/sys/bus/pci/devices/$1/net" 2>/dev/null
}
named() {
    [ -n "$(interface "$1")" ]
}
kernel "$ours"
wait_for 20 named "$ours"
one=$(interface "$theirs")
two=$(interface "$ours")
# In a network namespace of its own, so that packets take the cable.
unshare -n sleep 60 &
other=$!
apart() {
    [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/self/ns/net)" ]
}
wait_for 10 apart
ip link set "$two" netns $other
there() {
    nsenter -t $other -n "$@"
}
ip addr add 192.0.2.1/24 dev "$one"
there ip addr add 192.0.2.2/24 dev "$two"
ip link set "$one" up
there ip link set "$two" up
linked() {
    ip link show dev "$one" | grep -q LOWER_UP && there ip link show dev "$two" | grep -q LOWER_UP
}
wait_for 20 linked
ping -q -c 20 -i 0.05 -w 30 192.0.2.2 | tee /tmp/pings
grep -q "20 packets received" /tmp/pings
# What the emulated cards lose of long packets between Linux's own drivers: told, not judged.
there ip link set "$two" mtu 9000
wait_for 20 linked
ping -q -c 200 -i 0.01 -w 30 -s 8900 192.0.2.2 | tail -n 2 || true
there ip link set "$two" down
there ip link set "$two" netns 1
ip addr del 192.0.2.1/24 dev "$one"
ip link set "$one" down
! dmesg | grep -i 'NETDEV WATCHDOG\|igb.*\( hang\|timeout\)'
