# list, bind and unbind on the real thing: the first NVMe controller and the network card.
nvme=0000:01:00.0
card=0000:03:00.0
driver() {
    basename "$(readlink "/sys/bus/pci/devices/$1/driver")"
}
disk_of() {
    for disk in /sys/bus/pci/devices/$1/nvme/nvme*/nvme*n*; do
        [ "$(cat "$disk/nsid" 2>/dev/null)" = "$2" ] && echo "/dev/${disk##*/}" && return
    done
    return 1
}
refused() {
    if vfio-uring bind "$1" 2>/tmp/why; then
        echo "$1 was bound, in use as it is"
        return 1
    fi
    cat /tmp/why
    grep -q "$2" /tmp/why
}

vfio-uring list
vfio-uring bind --dry-run $nvme
[ "$(driver $nvme)" = nvme ]

# In use: a mounted disk, an interface that is up.
wait_for 10 disk_of $nvme 1
disk=$(disk_of $nvme 1)
/bin/mke2fs -q -F -t ext4 "$disk"
mount -t ext4 "$disk" /mnt
refused $nvme mounted
umount /mnt
ifconfig eth0 up
refused $card up
ifconfig eth0 down
[ "$(driver $nvme)" = nvme ]
[ "$(driver $card)" = igb ]

for device in $nvme $card; do
    vfio-uring bind $device
    [ "$(driver $device)" = vfio-pci ]
done
vfio-uring list
vfio-uring list $nvme
[ -c /dev/vfio/devices/"$(ls /sys/bus/pci/devices/$nvme/vfio-dev)" ]
vfio-uring info $nvme
vfio-uring info group:$nvme | grep -q 'can be reset'
for device in group:$nvme cdev:$nvme; do
    vfio-uring bench --device $device --runtime 1 --size 4m --iodepth 8 2>/dev/null
done
vfio-uring bench --device $nvme --runtime 1 --size 4m --iodepth 4 --rw randrw --verify --interrupts --idle park 2>/dev/null
vfio-uring unbind $nvme
vfio-uring unbind $card
[ "$(driver $nvme)" = nvme ]
[ "$(driver $card)" = igb ]

# The kernel's driver has its disk again.
wait_for 10 disk_of $nvme 1
