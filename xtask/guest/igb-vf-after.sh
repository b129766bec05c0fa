pf=0000:03:00.0
folder=/sys/bus/pci/devices/$pf
name=$(ls $folder/net)
echo 0 >$folder/sriov_numvfs
echo 1 >$folder/sriov_drivers_autoprobe
ip addr flush dev "$name"
ip link set "$name" down
ip link set "$name" mtu 1500
