# Two virtual functions of the first card for vfio-pci; the card itself stays with the kernel's driver, as an interface that is up.
pf=0000:03:00.0
folder=/sys/bus/pci/devices/$pf
name=$(ls $folder/net)
# Not for the kernel's driver of virtual functions.
echo 0 >$folder/sriov_drivers_autoprobe
echo 2 >$folder/sriov_numvfs
ip link set "$name" mtu 9000
ip addr add 192.0.2.1/24 dev "$name"
ip link set "$name" up
carrier() {
    [ "$(cat /sys/class/net/"$name"/carrier)" = 1 ]
}
wait_for 20 carrier
vfio 0000:03:10.0 0000:03:10.2
