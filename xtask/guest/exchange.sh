# What our driver wrote the kernel's driver reads, and the reverse: the device changes hands between them.
nvme=0000:01:00.0
test=/tests/vfio-uring-cli.on_device
disk_of() {
    for disk in /sys/bus/pci/devices/$nvme/nvme/nvme*/nvme*n*; do
        [ "$(cat "$disk/nsid" 2>/dev/null)" = 1 ] && echo "/dev/${disk##*/}" && return
    done
    return 1
}
ours() {
    vfio $nvme
    VFIO_URING_DEVICE=$nvme VFIO_URING_EXCHANGE=$1 $test exchange_with_another_driver --exact
    kernel $nvme
    wait_for 10 disk_of
}
for file in 1 2; do
    dd if=/dev/urandom of=/tmp/data$file bs=1M count=8 2>/dev/null
done
ours write:/tmp/data1
dd if="$(disk_of)" of=/tmp/back bs=1M count=8 2>/dev/null
cmp /tmp/back /tmp/data1
dd if=/tmp/data2 of="$(disk_of)" bs=1M 2>/dev/null
sync
ours compare:/tmp/data2
