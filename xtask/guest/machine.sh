# What the host does for the guest: unplugging, plugging, cables. And what the cards say to each other, and their virtual functions.
plug=0000:05:00.0
card0=0000:03:00.0
card1=0000:06:00.0
folder=/sys/bus/pci/devices
host device_del plug
wait_for 20 [ ! -e $folder/$plug ]
host device_add plug
wait_for 20 [ -e $folder/$plug/driver ]
# A request that is not granted has its reason, and does no harm.
if host quit; then exit 1; fi

net() {
    ls $folder/"$1"/net
}
first=$(net $card0)
second=$(net $card1)
ip link set "$first" up
ip link set "$second" up
carrier() {
    [ "$(cat /sys/class/net/"$1"/carrier)" = "$2" ]
}
wait_for 20 carrier "$first" 1
host set_link card0 off
wait_for 20 carrier "$first" 0
host set_link card0 on
wait_for 20 carrier "$first" 1
wait_for 20 carrier "$second" 1
# Broadcasts of one are received by the other.
received() {
    [ "$(cat /sys/class/net/"$second"/statistics/rx_packets)" -gt "$1" ]
}
before=$(cat /sys/class/net/"$second"/statistics/rx_packets)
ip addr add 192.0.2.1/24 dev "$first"
arping -c 3 -I "$first" 192.0.2.2 || true
wait_for 10 received "$before"
ip link set "$second" down
for card in $card0 $card1; do
    echo 2 >$folder/$card/sriov_numvfs
    [ -e $folder/$card/virtfn1 ]
    echo 0 >$folder/$card/sriov_numvfs
done
ip addr del 192.0.2.1/24 dev "$first"
ip link set "$first" down
# The pair shares a bus and a group.
[ "$(readlink $folder/0000:04:00.0/iommu_group)" = "$(readlink $folder/0000:04:00.1/iommu_group)" ]
